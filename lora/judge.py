"""How good a model is on held-out examples: loss of the wanted answer, and the greedy answer beside the wanted one.

Answers are compared without the whitespace at their ends: `exact` is equality, `similarity` that of
lora/statistics.py. An answer ends at the template's end, or after as many tokens as the longest wanted answer has,
since a longer one is wrong anyway. One line of JSON an example, so that everything can be computed again. Refused:
files with other fields.

Shapes: N examples, R rows, T the context, V vocabulary, n scored places.
"""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common.log import atomic_write, read_jsonl
from lora.examples import is_whole_signature
from lora.packing import IGNORED, Rows
from lora.statistics import edit_similarity
from lora.task import Task
from minigpt.generate import generate, stream_text
from minigpt.model import GPT
from minigpt.sample import document_tokens
from minigpt.sampling import Sampling
from minigpt.tokenizer import Tokenizer
from parallel.comm import Comm

Autocast = Callable[[], AbstractContextManager]
ROWS = 16  # packed rows in one pass
AT_ONCE = 64  # answers written in one batch


@dataclass(frozen=True, slots=True)
class Judged:
    """One held-out example."""

    prompt: str
    wanted: str
    written: str
    nats: float  # cross-entropy of the wanted answer and its end, summed over their tokens
    tokens: int  # how many these are
    exact: bool
    similarity: float
    parses: bool | None  # of signatures


@torch.no_grad()
def losses(model: GPT, rows: Rows, examples: int, comm: Comm, autocast: Autocast) -> Tensor:
    """(nats, tokens) of the answer of each example, float64 (N, 2); the ranks of `comm` share the rows.

    rows: documents numbered from 0 to N - 1. autocast() is what a pass runs in.
    """
    device = next(model.parameters()).device
    totals_N2 = torch.zeros(examples, 2, dtype=torch.float64, device=device)
    mine = range(comm.rank, len(rows), comm.size)
    for start in range(0, len(mine), ROWS):
        part = rows.batch(list(mine[start : start + ROWS]), device)
        with autocast():
            logits_nV, targets_n = part.scored_logits(model)
        nats_n = F.cross_entropy(logits_nV, targets_n, reduction="none").double()
        numbers_n = part.documents_RT[part.targets_RT != IGNORED]
        totals_N2.index_add_(0, numbers_n, torch.stack([nats_n, torch.ones_like(nats_n)], dim=1))
    comm.all_reduce(totals_N2, tag="held-out losses")
    return totals_N2


@torch.no_grad()
def write_answers(model: GPT, task: Task, tokenizer: Tokenizer, comm: Comm, autocast: Autocast) -> list[str]:
    """The greedy answer to each prompt; the ranks of `comm` share the prompts."""
    length, device = task.longest_answer, next(model.parameters()).device
    tokens_NL = torch.zeros(len(task.prompts), length, dtype=torch.int64, device=device)
    order = sorted(range(len(task.prompts)), key=lambda n: len(task.prompts[n]))  # little padding in a batch
    mine = order[comm.rank :: comm.size]
    for start in range(0, len(mine), AT_ONCE):
        numbers = mine[start : start + AT_ONCE]
        steps = generate(
            model, [task.prompts[n] for n in numbers], max_new_tokens=length, sampling=Sampling(temperature=0.0),
            stop_tokens=task.ends, vocab_size=tokenizer.vocab_size, stop_at_context=True,
        )  # fmt: skip
        with autocast():
            for n, row in zip(numbers, zip(*steps, strict=True), strict=True):
                found = list(document_tokens(row, task.ends))
                tokens_NL[n, : len(found)] = torch.tensor(found, dtype=torch.int64, device=device) + 1  # 0: none
    comm.all_reduce(tokens_NL, tag="held-out answers")
    rows = [[token - 1 for token in row if token] for row in tokens_NL.tolist()]
    return ["".join(stream_text(iter(row), tokenizer)) for row in rows]


def judge(model: GPT, task: Task, tokenizer: Tokenizer, comm: Comm, autocast: Autocast) -> list[Judged]:
    """All held-out examples, in their order; the same on all ranks."""
    model.eval()
    totals = losses(model, task.held_out.rows, len(task.held_out_examples), comm, autocast).tolist()
    answers = write_answers(model, task, tokenizer, comm, autocast)
    judged = []
    for example, (nats, tokens), written in zip(task.held_out_examples, totals, answers, strict=True):
        wanted, found = example.answer.strip(), written.strip()
        parses = is_whole_signature(found) if task.signatures else None
        right, similarity = found == wanted, edit_similarity(found, wanted)
        judged.append(Judged(example.prompt, example.answer, written, nats, int(tokens), right, similarity, parses))
    return judged


def loss_of(judged: list[Judged]) -> float:
    """Nats a token, over all tokens of the answers."""
    return sum(each.nats for each in judged) / sum(each.tokens for each in judged)


def write_judged(path: Path, judged: list[Judged]) -> None:
    atomic_write(path, "".join(json.dumps(asdict(each)) + "\n" for each in judged))


def read_judged(path: Path) -> list[Judged]:
    """Raises ValueError naming the file where it holds something else."""
    try:
        return [Judged(**row) for row in read_jsonl(path)]
    except TypeError as error:
        raise ValueError(f"{path}: {error}: expected the lines that lora.finetune writes") from None
