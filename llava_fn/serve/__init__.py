"""A server that speaks OpenAI's API, and the chat page that it serves: `recipes/serve.py` starts it.

options.py   where it listens, and limits of a request
refused.py   Refused: why a request is not answered
fields.py    every field of a request: what is used, what cannot matter, what is refused
messages.py  a request's messages -> Chat
ask.py       a request's JSON -> Asked, or Refused
seat.py      one answer in its slot, on the host: what is asked for, and what each token adds
engine.py    Desk: slots of one cache; admit, step, release: functions from a Desk to a Desk
worker.py    the one thread that steps a Desk; queues to it and from it
answer.py    deltas -> OpenAI's forms, of chat and of text completions
reply.py     answers on their way out, whole or as a stream
metrics.py   what Prometheus collects
app.py       the web side: routes, the key, limits
page.html    the chat page, one file
"""
