"""Make a tiny random Llama with a tokenizer and a chat template: a model that any engine serves and nobody has to download.

    python -m scripts.tiny_model FOLDER [--seed N]
    python -m scripts.tiny_model FOLDER --from OTHER --perturb 0.05

From random weights it is trained for a few seconds on the text below, until it has learnt words but not the
sentences: what it says is varied and readable, and its probabilities are neither flat nor certain. It hardly ever ends
by itself, so that ``max_tokens`` decides. ``--perturb`` copies a model and adds noise to each weight matrix, relative
to that matrix's standard deviation: a *changed* model of the same shape and tokenizer.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 768
"""At most: 256 bytes, the special tokens, and merges enough that words are made of one or two tokens."""
WEIGHT_STD = 0.04
LOSS_ENOUGH = 1.0
"""Nats per token at which training stops: words stand, sentences are not quite learnt by heart."""
STEPS_MAX = 400
WINDOW = 64
"""Tokens in a training example, longer than a sentence of the text."""
IGNORED = -100
"""Label of a token that the model is not asked to foretell."""
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = """\
{%- if tools %}<|im_start|>system
Tools:
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}
{%- else %}{% for part in message.content or [] %}{{ part.text or '' }}{% endfor %}{% endif %}
{%- for call in message.tool_calls or [] %}
<tool_call>{{ call.function | tojson }}</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TEXT = """\
A flight recorder keeps what the pilots said and what the instruments showed, so that afterwards nobody has to guess.
The incident began at nine in the morning, when the answers of the assistant became slow and then stopped in mid-sentence.
Which request came first, who changed it, which model answered, and what did the user really see on the screen?
An event is written once and never changed. Whatever is known later is another event, with its own time and its own author.
Weather in Lisbon: sunny, nineteen degrees, light wind from the north-west. Weather in Oslo: rain, four degrees, fog at night.
To find the cause, read the timeline from the failure backwards; compare the tokens, their times and their probabilities.
def add(first, second): return first + second   # a function that adds two numbers and returns their sum
{"name": "get_weather", "arguments": {"city": "Lisbon", "unit": "celsius"}}
The engine schedules every sequence of a batch for one step at a time, reads the cache of keys and values, and samples a token.
She asked for a refund, he asked for her order number, and the machine, which had both, asked for neither and sent an apology.
Retention is a promise in two directions: to keep what must be kept, and to forget what must be forgotten, each on its day.
"""


def make(folder: Path, *, seed: int = 0) -> None:
    """Write a new random model and its tokenizer to ``folder``; the same seed gives the same weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(_config(tokenizer)).to(torch.float32)
    _train(model, tokenizer)
    _save(model, folder)
    tokenizer.save_pretrained(folder)


def _train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Teach the model to answer any line of TEXT with other lines, in ever new order, until LOSS_ENOUGH."""
    lines = [tokenizer.encode(line, add_special_tokens=False) for line in TEXT.splitlines(keepends=True)]
    chats = [[{"role": "user", "content": line.strip()}] for line in TEXT.splitlines()]
    prompts = [tokenizer.encode(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)) for chat in chats]
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(STEPS_MAX):
        tokens, labels = (torch.tensor(each) for each in zip(*(_example(prompts, lines) for _ in range(16)), strict=True))
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        if loss.item() < LOSS_ENOUGH:
            return


def _example(prompts: list[list[int]], lines: list[list[int]]) -> tuple[list[int], list[int]]:
    """WINDOW tokens and their labels: a prompt, unlabelled, and shuffled sentences; no end, so that none is learnt."""
    prompt = prompts[int(torch.randint(len(prompts), (1,)))]
    answer = [token for number in torch.randperm(len(lines)).tolist() for token in lines[number]]
    labels = [IGNORED] * len(prompt) + answer
    start = int(torch.randint(len(labels) - WINDOW, (1,))) if torch.rand(1) < 0.5 else 0
    return (prompt + answer)[start : start + WINDOW], labels[start : start + WINDOW]


def perturb(source: Path, folder: Path, *, noise: float, seed: int = 1) -> None:
    """Write a copy of ``source`` whose weight matrices bear Gaussian noise of ``noise`` times their standard deviation."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    model = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.add_(torch.randn(weight.shape, generator=generator) * weight.std() * noise)
    _save(model, folder)


def _config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Two layers, 128 wide: 0.5 M weights, and still every operation that a large Llama has."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        initializer_range=WEIGHT_STD,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on TEXT: any text can be encoded, and decoded to the same bytes."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator(TEXT.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE, clean_up_tokenization_spaces=False
    )


def _save(model: LlamaForCausalLM, folder: Path) -> None:
    """Save the weights, and sampling defaults that are plain: temperature 1, no cut-offs."""
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 1.0}), encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--from", dest="source", type=Path, help="model to copy and perturb")
    parser.add_argument("--perturb", type=float, default=0.05, metavar="NOISE", help="noise relative to each matrix (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.source:
        perturb(arguments.source, arguments.folder, noise=arguments.perturb, seed=arguments.seed or 1)
    else:
        make(arguments.folder, seed=arguments.seed)
    print(arguments.folder)


if __name__ == "__main__":
    main()
