"""The sampling program: what it prints, what it refuses, and that it is `generate` underneath."""

import sys
from dataclasses import asdict

import pytest
import torch

from common import cli
from minigpt import sample
from minigpt.checkpoint import TOKENIZER, save_checkpoint
from minigpt.config import GPTConfig
from minigpt.generate import generate
from minigpt.hf import save_pretrained
from minigpt.model import GPT
from minigpt.sample import SampleConfig, load_source, sample_text
from minigpt.sampling import Sampling
from minigpt.tokenizer import Tokenizer
from tests.minigpt.programs import run

SMALL = {"context": 24, "layers": 1, "width": 16, "heads": 2, "kv_heads": 1, "mlp_width": 16}
LLAMA = {"norm": "rmsnorm", "mlp": "swiglu", "qk_norm": False, "softcap": 0.0}
TOKENIZERS = {
    "bytes": Tokenizer.bytes_only(),
    "llama": Tokenizer(
        Tokenizer.bytes_only().ranks,
        Tokenizer.bytes_only().pattern,
        {"<|begin_of_text|>": 256, "<|end_of_text|>": 257, "<|eot_id|>": 258},
    ),
}


def random_gpt(**changes) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{"vocab_size": 264, **SMALL, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3 + (p.ndim == 1))
        model.head.weight *= 5
        model.head.weight[256:] = 0  # the separator seldom wins, so samples are long
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("run"), random_gpt()
    save_checkpoint(folder, 3, {"model_config": asdict(model.config)}, {"model": model.state_dict()}, 1)
    TOKENIZERS["bytes"].save(folder / TOKENIZER)
    return folder


@pytest.fixture
def program(monkeypatch, capsys):
    """Runs the program in this process; (exit code, stdout, stderr)."""

    def call(*flags: object) -> tuple[int | None, str, str]:
        monkeypatch.setattr(sys, "argv", ["program", *map(str, flags)])
        with pytest.raises(SystemExit) as stop:
            cli.run(sample.main)
        return stop.value.code, *capsys.readouterr()

    return call


def expected(prompt: str, length: int, **settings) -> str:
    """The sample by `generate` alone; the separator and the prompt open the document."""
    steps = generate(
        random_gpt(),
        [[256, *prompt.encode()]],
        max_new_tokens=length,
        sampling=Sampling(**settings),
        vocab_size=257,
        stop_tokens=[256],
    )
    return bytes(token for (token,) in steps if token < 256).decode(errors="replace")


@pytest.mark.parametrize("flags", [(), ("--no-cache",)])
def test_one_sample_is_the_prompt_and_what_follows(program, folder, flags, monkeypatch):
    if flags:
        monkeypatch.setattr("minigpt.generate.KVCache", None)  # not used then
    code, out, err = program("--folder", folder, "--prompt", "dé", "--length", 40, "--seed", 3, *flags)
    monkeypatch.undo()
    assert not code and out == "dé" + expected("dé", 40, seed=3) + "\n"
    assert err.startswith("40 tokens in ") and err.endswith(" tokens/s\n") and err.count("\n") == 1


def test_several_samples_are_those_of_the_next_seeds(program, folder):
    settings = {"temperature": 1.1, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2}
    flags = [part for name, value in settings.items() for part in ("--" + name.replace("_", "-"), value)]
    code, out, err = program("--folder", folder, "--prompt", "a", "--length", 9, "--samples", 3, "--seed", 7, *flags)
    wanted = [
        f"--- sample {n + 1} of 3, seed {7 + n}\na" + expected("a", 9, seed=7 + n, **settings) + "\n" for n in range(3)
    ]
    assert not code and out == "".join(wanted) and err.startswith("27 tokens in ")


def test_a_stop_string_ends_the_sample(program, folder):
    whole = expected("a", 30, seed=0)
    stop = whole[7:10]
    code, out, err = program("--folder", folder, "--prompt", "a", "--length", 30, "--stop", stop)
    assert not code and out == "a" + whole[: whole.index(stop)] + "\n" and int(err.split()[0]) < 30


def test_sample_text_is_the_continuation(folder):
    text = sample_text(random_gpt(), TOKENIZERS["bytes"], "dé", length=30, sampling=Sampling(seed=2))
    assert text == expected("dé", 30, seed=2)


def test_a_new_document_ends_the_sample(folder):
    model = random_gpt()
    with torch.no_grad():
        model.norm.weight.zero_()  # all logits are equal: the separator comes soon
    text = sample_text(model, TOKENIZERS["bytes"], "x", length=5000, sampling=Sampling(temperature=1.0))
    assert 0 < len(text) < 4999 and "<|" not in text


@pytest.mark.parametrize(
    ("kind", "prompt", "document"),
    [
        ("bytes", "ab", [97, 98]),
        ("bytes", "", [256]),
        ("bytes", "<|endoftext|>", list(b"<|endoftext|>")),
        ("llama", "ab", [256, 97, 98]),
        ("llama", "", [256]),
    ],
)
def test_how_documents_of_hugging_face_models_open(kind, prompt, document, tmp_path):
    save_pretrained(random_gpt(**LLAMA), tmp_path, tokenizer=TOKENIZERS[kind])
    source = load_source(SampleConfig(hf=tmp_path))
    assert source.document(prompt) == document
    assert source.ends == ({256} if kind == "bytes" else {257, 258})


def test_sampling_from_a_hugging_face_folder(program, tmp_path):
    model = random_gpt(**LLAMA)
    save_pretrained(model, tmp_path, tokenizer=TOKENIZERS["bytes"])
    code, out, _ = program("--hf", tmp_path, "--prompt", "ab", "--length", 20, "--temperature", 0)
    steps = generate(model, [[97, 98]], max_new_tokens=20, sampling=Sampling(temperature=0), vocab_size=257)
    assert not code and out == "ab" + bytes(token for (token,) in steps).decode(errors="replace") + "\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--length", 0), "length 0: expected at least 1"),
        (("--samples", 0), "samples 0: expected at least 1"),
        (("--stop", ""), "stop '': expected a text, or none"),
        (("--temperature", "-0.1"), "temperature -0.1: expected 0"),
        (("--top-p", "nan"), "top_p nan: expected more than 0 and at most 1"),
        (("--seed", -1), "seed -1: expected 0"),
        (("--prompt", "x" * 24), "prompt 0 has 25 tokens: expected 1 to the context, 24"),
        (("--folder", "nowhere"), "nowhere: no such checkpoint"),
        (("--hf", "nowhere"), "nowhere"),
        (("--device", "cuda"), "device cuda: torch finds none here"),
    ],
)
def test_what_is_wrong_ends_with_one_line(program, folder, flags, message):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    code, out, err = program("--folder", folder, *flags)
    assert code == 2 and not out and message in err and err.count("\n") == 1


def test_as_a_process(folder):
    code, out, err = run("minigpt.sample", "--folder", folder, "--prompt", "dé", "--length", 20)
    assert code == 0 and out == "dé" + expected("dé", 20) + "\n", err
