"""DeepSeek's own addresses: OpenAI's without `/v1`, and those of its beta, which continue answers and fill holes.

What its API adds to bodies and answers, the others have too: `thinking`, `prefix`, `reasoning_content`, cache hits.
"""

from fastapi import APIRouter

from kogia.serve.openai_chat import chat_completions
from kogia.serve.openai_completions import completions
from kogia.serve.openai_models import models
from kogia.serve.strict import StrictRoute

router = APIRouter(route_class=StrictRoute, tags=["DeepSeek"])
for prefix in ("", "/beta", "/beta/v1"):
    router.add_api_route(f"{prefix}/chat/completions", chat_completions, methods=["POST"])
    router.add_api_route(f"{prefix}/completions", completions, methods=["POST"])
    router.add_api_route(f"{prefix}/models", models, methods=["GET"])
