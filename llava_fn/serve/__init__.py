"""A server that speaks OpenAI's chat API, and the chat page that it serves: `recipes/serve.py` starts it.

options.py  limits of a request
ask.py      a request's JSON -> ChatRequest, or Refused
engine.py   Desk: slots of one cache; admit, step, release: functions from a Desk to a Desk
worker.py   the one thread that steps a Desk; queues to it and from it
app.py      the web side: routes, limits, streams
page.html   the chat page, one file
"""
