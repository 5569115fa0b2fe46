"""`kogia serve`: one process that answers over HTTP as OpenAI's, DeepSeek's and Anthropic's APIs do.

    HTTP ──▶ Guard ──▶ route of one API ──▶ Engine.submit ──Stream──▶ pieces ──▶ chunks, or one answer
             host,     its body; who asks;  the engine's thread       what an event brings,    in the words
             sizes,    a prompt and one     steps, and waits          split in thought,        of that API
             500s      SamplingParams       for no client             answer and calls

Where to plug in (docs/server.md has more):

* `app.create_app(state)` builds the application from a `ServerState` (state.py): models by name, keys, what runs,
  whether it is loading, ready or draining. `process.py` is the command: it loads, says when it is ready, and drains.
* One file per API, each with `router = APIRouter(...)`; `app.py` lists them. FastAPI describes the routes and finds
  them, but for those that generate, which `strict.Shortcut` calls. Routes that need a key take
  `caller: Caller = Depends(authenticate)` (access.py), the one place where limits per key belong; what concerns bytes
  and headers, before any route, is `guard.py`.
* Requests are pydantic models on `fields.Body`, whose numbers are bounded; `sampling.py` has what they share and makes
  `SamplingParams` of it, `prompts.py` makes a prompt of messages. What will not do raises `ApiError` (errors.py).
* `generation.run` starts a request, `generation.pieces` is the one generator of what comes; a whole answer is the
  pieces of a streamed one, joined. So the two cannot differ.
"""
