"""`teal generate`: continue prompts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from teal.cli.console import print_json, quiet_libraries
from teal.cli.options import (
    DeviceOption,
    DtypeOption,
    GroupSizeOption,
    JsonOption,
    ModelArgument,
    PlanOption,
    QuantizeHeadOption,
    QuantizeOption,
    TablesOption,
    scheme_of,
)

if TYPE_CHECKING:
    from teal.engine.engine import Engine
    from teal.engine.request import Generation, GenerationOptions

app = typer.Typer(add_completion=False)

EXAMPLES = """Examples:

teal generate models/py-16m --prompt "import os" --plan plan --sparsity 0.4

teal generate models/py-16m --prompt "def main():" --temperature 0.8 --top-p 0.95 --stop "def "
"""


@app.command(epilog=EXAMPLES)
def command(
    model: ModelArgument,
    prompt: Annotated[
        list[str],
        typer.Option("--prompt", help="Text to continue; repeat it to continue up to 8 at once."),
    ],
    plan: PlanOption = None,
    sparsity: Annotated[
        float | None,
        typer.Option("--sparsity", help="Another sparsity of the plan; 0 decodes dense."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put each prompt into the model's chat template.")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", help="Tokens to generate at most.")
    ] = 64,
    temperature: Annotated[
        float, typer.Option("--temperature", help="0 takes the likeliest token.")
    ] = 0.0,
    top_k: Annotated[
        int, typer.Option("--top-k", help="Sample from this many likeliest tokens; 0 is all.")
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option("--top-p", help="Sample from the likeliest tokens up to this probability."),
    ] = 1.0,
    min_p: Annotated[
        float,
        typer.Option(
            "--min-p", help="Sample from tokens at least this likely, relative to the likeliest."
        ),
    ] = 0.0,
    repetition_penalty: Annotated[
        float,
        typer.Option("--repetition-penalty", help="Above 1, makes repeated tokens less likely."),
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="For temperatures above 0.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="Text to stop before; may be repeated.")
    ] = None,
    quantize: QuantizeOption = None,
    group_size: GroupSizeOption = None,
    quantize_head: QuantizeHeadOption = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    tables: TablesOption = None,
    json: JsonOption = False,
) -> None:
    """Continue prompts; with a plan, prefill is dense and every new token sparse."""
    from teal.engine.engine import Engine
    from teal.engine.request import GenerationOptions
    from teal.models.loading import load_tokenizer
    from teal.plan import SparsityPlan

    quiet_libraries()
    scheme = scheme_of(quantize, group_size)
    loaded_plan = SparsityPlan.load(plan) if plan else None
    tokenizer = load_tokenizer(model)
    prompts = [encode_prompt(text, tokenizer, is_chat=chat) for text in prompt]
    engine = Engine(
        model,
        loaded_plan,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        quantize=scheme,
        quantize_head=quantize_head,
        tuning=tables,
    )
    options = GenerationOptions(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop or (),
        sparsity=sparsity,
    )
    if json:
        print_json(_content(prompt, engine.generate(prompts, **options)))
        return
    if len(prompts) == 1:
        # A chat shows the answer only, a text goes on from the prompt.
        typer.echo("" if chat else prompt[0], nl=False)
        result = _streamed(engine, prompts, options)
    else:
        result = engine.generate(prompts, **options)
        for given, text in zip(prompt, result.texts, strict=True):
            typer.echo(f"── {given.splitlines()[0]} ──\n{'' if chat else given}{text}\n")
    count = sum(map(len, result.tokens))
    typer.echo(f"{count} tokens, {result.tokens_per_second:.1f} tokens/s", err=True)


def encode_prompt(prompt: str, tokenizer: Any, *, is_chat: bool = False) -> list[int]:
    """Turn a prompt into token ids.

    Args:
        prompt: Text.
        tokenizer: The model's Hugging Face tokenizer.
        is_chat: Put the prompt into the chat template, as a message of the user.

    Raises:
        UserError: The tokenizer has no chat template.
    """
    from teal.foundation.errors import UserError

    if not is_chat:
        return list(tokenizer(prompt)["input_ids"])
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "This model's tokenizer has no chat template. Leave --chat out, or take a model that "
            "was trained to chat."
        )
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    # The template writes the special tokens itself.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _streamed(
    engine: "Engine", prompts: Sequence[Sequence[int]], options: "GenerationOptions"
) -> "Generation":
    from teal.engine.request import Recorder

    tokens = engine.stream(prompts, **options)
    recorder = Recorder(len(prompts))
    for token in tokens:
        recorder.add(token)
        typer.echo(token.text, nl=False)
    typer.echo()
    return recorder.result()


def _content(prompts: Sequence[str], result: "Generation") -> dict[str, Any]:
    sequences = zip(prompts, result.texts, result.tokens, result.finish_reasons, strict=True)
    return {
        "sequences": [
            {"prompt": prompt, "text": text, "tokens": tokens, "finish_reason": reason}
            for prompt, text, tokens, reason in sequences
        ],
        "prefill_seconds": result.prefill_seconds,
        "decode_seconds": result.decode_seconds,
        "tokens_per_second": result.tokens_per_second,
    }
