"""Plans by a language model: the question, the answer, and real tiny transformers models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from llm_case import GOOD, LEVELS, PLAN, SHOWN, ask, task, trial
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from entrecipes.errors import UserError
from entrecipes.experts.llm import LanguageModel, conversation, parse
from entrecipes.recipe.base import build, choice
from entrecipes.recipe.experts import LanguageModelProposer


def test_the_question_says_all_that_the_search_knows():
    system, question = conversation(task(), SHOWN, 2)
    assert (system["role"], question["role"]) == ("system", "user") and "pruning" in system["content"]
    lines = question["content"].splitlines()
    assert "between -20.0 dB and 20.0 dB" in lines[0] and "500 FLOPs" in lines[0] and "50.0%" in lines[0]
    assert "0.0625" in lines[0]
    assert lines[3:6] == [
        "0: down.0, widths, 8, 40.00%, 0.9",
        "1: mid, blocks, 1, 20.00%, 0.3",
        "2: mid.ff, feed_forward, 4, 10.00%, 0.25, inside unit 1",
    ]
    assert "Allowed shares: 1.0, 0.75, 0.5, 0.25" in lines
    assert "[0.5, 1.0, 0.75]: 1.010 of the budget, loss 0.1, 0.02 above the best" in lines
    assert "[1.0, 0.0, 0.25]: 1.010 of the budget, loss 0.08, 0 above the best" in lines
    assert "exactly 2 lists of exactly 3 shares" in lines[-1]
    assert "No plan has been measured so far." in conversation(task(), [], 2)[1]["content"]


@pytest.mark.parametrize(
    ("answer", "plans", "wrong"),
    [
        (GOOD, [PLAN], ""),
        (f"Sure!\n```json\n{GOOD}\n```\nIt keeps {{more}}.", [PLAN], ""),
        (f'Not {{"plans": [[1, 1]]}} but {GOOD}', [PLAN], ""),
        ('<think>{"plans": [[1, 1, 1]]}</think>' + GOOD, [PLAN], ""),
        ('{"answer": ' + GOOD + "}", [PLAN], ""),
        ('{"plans": [[7, -0.3, 1' + 400 * "0" + "]]}", [(1.0, 0.25, 1.0)], ""),
        ('{"plans": [[0.5, 0.75]]}', [], "plan 0 has 2 shares in place of 3"),
        ('{"plans": [[0.5, 0.75, 1], [1, 1, 1]]}', [PLAN], "2 plans in place of 1"),
        ('{"plans": []}', [], "0 plans in place of 1"),
        ('{"plans": [[0.5, NaN, 1]]}', [], "no finite number"),
        ('{"plans": [[0.5, Infinity, 1]]}', [], "no finite number"),
        ('{"plans": [[0.5, "0.75", 1]]}', [], "no finite number"),
        ('{"plans": [[0.5, true, 1]]}', [], "no finite number"),
        ('{"plans": [0.5, 0.75, 1]}', [], "plan 0 is not a list"),
        ('{"plans": {"a": [1]}}', [], "is not a list"),
        ("[[0.5, 0.75, 1]]", [], "no JSON object"),
        (GOOD[:-1], [], "no JSON object"),
        (2_000 * '{"plans":[', [], "no JSON object"),
        ("", [], "no JSON object"),
    ],
)
def test_answers_are_read_strictly_whatever_stands_around_them(answer, plans, wrong):
    found, problem = parse(answer, 1, 3, LEVELS)
    assert found == plans
    assert wrong in problem and bool(wrong) == bool(problem)


# Models run here

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT
PIECES = ['{"plans": [[', "0.5, 0.75, ", "1.0]]}"]


def tokenizer(template: str | None = CHAT) -> PreTrainedTokenizerFast:
    """Bytes, and the answer in three pieces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    bytewise.add_tokens(PIECES)
    bytewise.add_special_tokens(["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<|end|>", chat_template=template)


def llama(words: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """About ten thousand random weights."""
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def saved(folder: Path, words: PreTrainedTokenizerFast, model: torch.nn.Module) -> str:
    words.save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)


def local(model: str, **keys: Any) -> LanguageModel:
    section = LanguageModelProposer(model=model, **({"max_new_tokens": 24, "repairs": 1} | keys))
    return build("proposer", section)


def test_the_registry_leads_here(tmp_path):
    assert choice("proposer", "llm").load() is LanguageModel
    assert local(str(tmp_path)).name == "llm"


@pytest.mark.parametrize("template", [CHAT, None, NO_SYSTEM])
def test_gibberish_gives_no_plan(tmp_path, caplog, template):
    words = tokenizer(template)
    proposer = local(saved(tmp_path, words, llama(words)))
    state = torch.random.get_rng_state()
    assert ask(proposer) == []
    assert proposer.last_note.startswith("no plan after 1 repairs: ") and "max_new_tokens=24" in proposer.last_note
    assert len(proposer.last_exchange) == 5 and proposer.last_exchange[2]["content"]
    assert torch.equal(torch.random.get_rng_state(), state)
    first = proposer.last_exchange
    assert ask(proposer, seed=1) == [] and proposer.last_exchange == first  # greedy


def test_sampling_follows_the_generator(tmp_path):
    words = tokenizer()
    proposer = local(saved(tmp_path, words, llama(words)), temperature=1.0, repairs=0)
    state = torch.random.get_rng_state()
    answers = []
    for seed in (0, 0, 1):
        ask(proposer, seed=seed)
        answers.append(proposer.last_exchange[-1]["content"])
    assert answers[0] == answers[1] != answers[2]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_model_that_learned_to_answer_gives_its_plan(tmp_path):
    words = tokenizer()
    model = llama(words)
    text = words.apply_chat_template(conversation(task(), SHOWN, 1), tokenize=False, add_generation_prompt=True)
    prompt = words(text, add_special_tokens=False).input_ids
    answer = words("".join(PIECES) + "<|end|>", add_special_tokens=False).input_ids
    assert len(answer) == 4
    tokens = torch.tensor([prompt + answer])
    labels = torch.where(torch.arange(tokens.shape[1]) < len(prompt), -100, tokens)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(30):
        loss = model(tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    proposer = local(saved(tmp_path, words, model))
    assert ask(proposer) == [PLAN]
    assert proposer.last_exchange[-1] == {"role": "assistant", "content": GOOD} and proposer.last_note == ""


def gpt2(words: PreTrainedTokenizerFast, context: int) -> GPT2LMHeadModel:
    end = words.eos_token_id
    config = GPT2Config(
        vocab_size=len(words), n_positions=context, n_embd=16, n_layer=1, n_head=2, bos_token_id=end, eos_token_id=end
    )
    return GPT2LMHeadModel(config)


def test_a_long_table_loses_its_oldest_trials_but_the_best(tmp_path):
    words = tokenizer(None)
    # 0 is the best; 1 is the oldest of the others
    shown = [trial(number, 0.1 + number / 100, (4 + number, 1, 3)) for number in range(4)]
    kept = conversation(task(), [shown[2], shown[3], shown[0]], 1)
    length = len(words("\n\n".join(part["content"] for part in kept) + "\n\n").input_ids)
    proposer = local(saved(tmp_path, words, gpt2(words, length + 24)), repairs=0)
    assert ask(proposer, shown) == [] and proposer.last_exchange[:2] == kept
    assert proposer.last_note.endswith("; 1 of 4 trials left out to fit the model's context")
    assert ask(proposer, shown[2:]) == [] and "left out" not in proposer.last_note


def test_a_question_longer_than_the_context_is_not_asked(tmp_path):
    words = tokenizer(None)
    proposer = local(saved(tmp_path, words, gpt2(words, 100)))
    assert ask(proposer) == [] and "longer than the model's context" in proposer.last_note


@pytest.mark.parametrize("name", ["{tmp}/missing", "./missing", "~/missing/model", "{tmp}/a/b/c"])
def test_a_missing_folder_is_the_users_mistake(tmp_path, name):
    with pytest.raises(UserError, match="experts.search.proposer.model: there is no folder .*missing|a/b/c"):
        local(name.format(tmp=tmp_path))


@pytest.mark.parametrize("broken", ["empty", "tokenizer.json", "config.json", "model.safetensors"])
def test_a_folder_that_does_not_load_is_the_users_mistake(tmp_path, broken):
    if broken != "empty":
        words = tokenizer()
        saved(tmp_path, words, llama(words))
        (tmp_path / broken).write_text('{"model_type": "no such model"}')
    proposer = local(str(tmp_path))
    with pytest.raises(UserError, match="experts.search.proposer.model: .*can't be loaded as a language model"):
        ask(proposer)
