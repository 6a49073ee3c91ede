"""LLaVA-1.5 as pure functions on PyTorch.

Shapes stand in comments, docstrings and einops strings by these letters, each with one meaning; sizes are local ones:

    t tokens of a stream or query rows    s key rows          b segments of one size
    i images     p patches of an image    d width             f width inside an MLP
    n heads      m key/value heads        h width of a head   v vocabulary      r selected rows

`axis` means a mesh axis, `dim` a tensor's dimension.
"""
