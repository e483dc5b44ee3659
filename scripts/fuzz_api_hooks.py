"""What scripts/fuzz-api changes in requests that Schemathesis makes, so that most of them reach the model."""

import json
import random

import schemathesis

MODEL = "default"
# What endpoints that ask a model must be told.
NEEDED = {"model", "prompt", "messages", "input", "max_tokens", "query", "documents", "text_1", "text_2"}
AS_IT_IS = 0.2
OTHERS_MAX = 3


@schemathesis.hook
def before_call(context, case, kwargs):
    """Asks for a model that there is, with few fields besides those that are needed: of many one is always wrong."""
    body = case.body
    if not isinstance(body, dict) or not isinstance(body.get("model"), str):
        return
    dice = random.Random(json.dumps(body, sort_keys=True, default=str))
    if dice.random() < AS_IT_IS:
        return
    others = [name for name in body if name not in NEEDED]
    kept = NEEDED.union(dice.sample(others, min(len(others), dice.randint(0, OTHERS_MAX))))
    case.body = {name: value for name, value in body.items() if name in kept and value != 0} | {"model": MODEL}
    if case.body.get("prompt") in ("", []):
        case.body["prompt"] = "A"
    messages = case.body.get("messages")
    for message in messages if isinstance(messages, list) else []:
        if isinstance(message, dict) and message.get("role") == "tool":
            message.setdefault("tool_call_id", "call_1")
