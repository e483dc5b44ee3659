#!/usr/bin/env python3
"""Renders chat templates with Jinja2 as transformers sets it up, for the test that compares ours with it.

usage: python3 models/tests/make_template_goldens.py TEMPLATES OUT [all]

TEMPLATES is the folder of templates that scripts/fetch-test-vocabs unpacks. OUT gets `{name: [rendering, ...]}`,
one rendering per conversation below, null where the template refuses it, false
where it fails. Without `all`, only the templates in
COMMON, whose renderings are committed (fixtures/templates.json). Needs transformers (made with 5.23.0).
"""

import json
import sys
from pathlib import Path

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import _compile_jinja_template

COMMON = [
    "HuggingFaceTB-SmolLM3-3B",
    "Qwen-Qwen2.5-7B-Instruct",
    "Qwen-Qwen3-0.6B",
    "Qwen-QwQ-32B",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
    "deepseek-ai-DeepSeek-V3.1",
    "google-gemma-2-2b-it",
    "google-gemma-4-31B-it",
    "ibm-granite-granite-4.0",
    "LFM2-8B-A1B",
    "meta-llama-Llama-3.1-8B-Instruct",
    "microsoft-Phi-3.5-mini-instruct",
    "mistralai-Mistral-Nemo-Instruct-2407",
]

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather <now> & here",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "é"}}, "required": ["city"]},
    },
}
USER = {"role": "user", "content": "What is 2 + 2?  "}
TURNS = [USER, {"role": "assistant", "content": "It is 4."}, {"role": "user", "content": "And <b>3 & 3</b>?\n"}]
CONVERSATIONS = [
    {"messages": [{"role": "system", "content": "Be brief: é."}, *TURNS]},
    {"messages": TURNS},
    {"messages": [{"role": "system", "content": "Be brief."}, USER], "tools": [TOOL]},
]


def render(source: str, conversation: dict) -> str | bool | None:
    names = {"tools": None, "documents": None, "add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>"}
    names |= {"functions": "[]", "datetime": "now", "date_string": "1 Jan 2026"}
    try:
        return _compile_jinja_template(source).render(**names | conversation)
    except TemplateError:
        return None
    except TypeError as error:
        # Python's Jinja2 iterates over nothing that is None; ours does.
        print(f"  {error}", file=sys.stderr)
        return False


def main() -> None:
    templates, out = Path(sys.argv[1]), Path(sys.argv[2])
    names = sorted(path.stem for path in templates.glob("*.jinja")) if sys.argv[3:] == ["all"] else COMMON
    rendered = {}
    for name in names:
        print(name, file=sys.stderr)
        source = (templates / f"{name}.jinja").read_text()
        rendered[name] = [render(source, conversation) for conversation in CONVERSATIONS]
    document = {"conversations": CONVERSATIONS, "templates": rendered}
    out.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
