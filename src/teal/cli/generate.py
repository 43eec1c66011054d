"""`teal generate`: continue a prompt."""

import time
from typing import Annotated, Any

import typer

from teal.cli.console import quiet_libraries
from teal.cli.options import DeviceOption, DtypeOption, ModelArgument, PlanOption

app = typer.Typer(add_completion=False)

EXAMPLES = """Examples:

teal generate models/py-16m --prompt "import os" --plan plan

teal generate models/py-16m --prompt "def main():" --temperature 0.8 --seed 1
"""


@app.command(epilog=EXAMPLES)
def command(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option("--prompt", help="Text to continue.")],
    plan: PlanOption = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Tokens to generate at most.")
    ] = 64,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token.")
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="For temperatures above 0.")] = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Continue a prompt, the prompt itself dense and every new token sparse with a plan."""
    from transformers import TextStreamer

    from teal.models.loading import load_model, load_tokenizer
    from teal.plan import SparsityPlan
    from teal.sparsification import sparsify

    quiet_libraries()
    loaded_plan = SparsityPlan.load(plan) if plan else None
    tokenizer = load_tokenizer(model)
    loaded = load_model(model, dtype=dtype, device=device)
    if loaded_plan:
        sparsify(loaded, loaded_plan)
    ids = encode_prompt(prompt, tokenizer, loaded, max_new_tokens)
    started = time.perf_counter()
    output = continuation(
        loaded,
        ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
    )
    seconds = time.perf_counter() - started
    count = output.shape[1] - ids.shape[1]
    typer.echo(f"{count} tokens, {count / seconds:.1f} tokens/s", err=True)


def encode_prompt(prompt: str, tokenizer: Any, model: Any, max_new_tokens: int) -> Any:
    """Turn a prompt into token ids, (1, tokens), on the model's device.

    Raises:
        UserError: It is empty, or prompt and continuation do not fit the model's context.
    """
    from teal.foundation.errors import UserError
    from teal.models.loading import context_length

    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    context, length = context_length(model.config), ids.shape[1]
    if length == 0:
        raise UserError("The prompt is empty. Give some text to continue.")
    if length + max_new_tokens > context:
        raise UserError(
            f"A prompt of {length} tokens and {max_new_tokens} new ones exceed the model's context "
            f"of {context}. Shorten the prompt or ask for fewer tokens."
        )
    return ids


def continuation(
    model: Any,
    ids: Any,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    streamer: Any = None,
) -> Any:
    """Return prompt and continuation as token ids, (1, tokens)."""
    import torch

    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        streamer=streamer,
        **({"do_sample": False} | sampling),
    )
