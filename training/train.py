"""Trains the bundled model on the generated corpus and writes model.pt, the vocabulary beside the weights.

    python train.py --out model.pt

The seed fixes the corpus, the initial weights and the order of batches; the learning rate falls to zero over a fixed
number of steps. The loss is taken on what the assistant says. Its second term keeps log Z, the logsumexp of the logits,
at 0: logits are then log-probabilities, and a repeat penalty of 1.2 only raises the probability of a token said before
to the power 1.2, where logits of an arbitrary level would make it overrule the model. In the end the last norm is multiplied by
SHARPNESS, so that sampling at temperature 1.0 leaves out the tail, which in so small a model is noise.
"""

import argparse
import dataclasses
import random
import time
from collections.abc import Callable

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

import corpus
import vocabulary
from model import Config, Phi3

SEED = 3
PIECES = 1750
TOKENS_PER_BATCH = 2048
PEAK_RATE = 2.5e-3
Z_LOSS = 1e-2
SHARPNESS = 1.5


def examples(tokenizer: Tokenizer, documents: list[str]) -> list[tuple[list[int], list[bool]]]:
    """Ids of each document and, for each of them, whether it is to be predicted.

    That is the assistant's words and what ends them, or everything in a document without turns.
    """
    assistant, end = (tokenizer.token_to_id(t) for t in ("<|assistant|>", "<|end|>"))
    result = []
    for encoding in tokenizer.encode_batch(documents):
        ids, said, speaking = encoding.ids, [], assistant not in encoding.ids
        plain = speaking
        for token in ids:
            said.append(speaking)
            if token == assistant:
                speaking = True
            elif token == end:
                speaking = plain
        said[0] = False
        said[-1] = True  # <|endoftext|>
        result.append((ids, said))
    return result


def batches(items: list[tuple[list[int], list[bool]]], rng: random.Random) -> list[list[tuple[list[int], list[bool]]]]:
    """Batches of about TOKENS_PER_BATCH, of items of one length or nearly, in random order."""
    items = sorted(items, key=lambda item: (len(item[0]), rng.random()))
    result, batch = [], []
    for item in items:
        if batch and len(item[0]) * (len(batch) + 1) > TOKENS_PER_BATCH:
            result.append(batch)
            batch = []
        batch.append(item)
    result.append(batch)
    rng.shuffle(result)
    return result


def tensors(batch: list[tuple[list[int], list[bool]]]) -> tuple[Tensor, Tensor]:
    """ids and mask, both (batch, length), padded at the end with 0 and False."""
    length = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in batch])
    said = torch.tensor([said + [False] * (length - len(said)) for _, said in batch])
    return ids, said


def losses(model: Phi3, hidden: Callable[[Tensor], Tensor], ids: Tensor, said: Tensor) -> tuple[Tensor, Tensor]:
    """The mean cross entropy of the tokens said, in nats, and the mean square of log Z. `hidden`: model.hidden, or the
    same compiled."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.lm_head(hidden(ids[:, :-1])[said[:, 1:]]).float()  # (tokens said, vocab)
    return F.cross_entropy(logits, ids[:, 1:][said[:, 1:]]), logits.logsumexp(-1).square().mean()


def check(config: Config, model: Phi3) -> None:
    """The model is transformers' Phi3ForCausalLM: the same logits, past the window too."""
    from transformers import Phi3Config, Phi3ForCausalLM

    reference = Phi3ForCausalLM(
        Phi3Config(
            vocab_size=config.vocab,
            hidden_size=config.hidden,
            intermediate_size=config.ff,
            rope_theta=config.theta,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=config.context,
            original_max_position_embeddings=config.context,
            sliding_window=config.window,
            rms_norm_eps=config.eps,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            attn_implementation="eager",
        )
    )
    reference.load_state_dict(model.state_dict())
    ids = torch.randint(0, config.vocab, (1, 2 * config.window))
    with torch.no_grad():
        error = (reference.eval()(ids).logits - model(ids)).abs().max().item()
    if error > 1e-3:
        raise SystemExit(f"the logits differ from transformers' by {error}")
    print(f"largest difference of a logit from transformers' Phi3ForCausalLM: {error:.1e}")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--steps", type=int, default=1600)
    arguments.add_argument("--out", default="model.pt")
    arguments.add_argument("--threads", type=int, default=2)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)

    started = time.time()
    words = vocabulary.train(corpus.segments(corpus.documents(SEED, 20_000)), PIECES)
    tokenizer = vocabulary.tokenizer(words)
    held_out = examples(tokenizer, corpus.documents(SEED + 1, 500))
    queue, rng, part = [], random.Random(SEED), 0
    config = Config(vocab=len(words.tokens))
    model = Phi3(config)
    print(f"{config}\n{sum(p.numel() for p in model.parameters()):,} parameters, {len(words.tokens)} tokens")

    decay = [p for p in model.parameters() if p.dim() == 2]
    other = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": other, "weight_decay": 0.0}], betas=(0.9, 0.98), fused=True
    )
    hidden = torch.compile(model.hidden, dynamic=True)
    seen = 0
    for step in range(options.steps):
        if not queue:  # fresh documents from the next seed
            part += 1
            queue = batches(examples(tokenizer, corpus.documents(SEED + 100 * part, 20_000)), rng)
        ids, said = tensors(queue.pop())
        seen += ids.numel()
        rate = PEAK_RATE * min((step + 1) / 100, 1 - step / options.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        entropy, level = losses(model, hidden, ids, said)
        (entropy + Z_LOSS * level).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step + 1 == options.steps:
            print(
                f"step {step:5}  loss {entropy.item():.3f}  log Z rms {level.item() ** 0.5:.2f}  "
                f"{seen / 1e6:.2f}M tokens  {time.time() - started:.0f} s",
                flush=True,
            )
    with torch.no_grad():
        sums = [
            (losses(model, model.hidden, *tensors(batch)), tensors(batch)[1].sum()) for batch in batches(held_out, rng)
        ]
    total = sum(n for _, n in sums)
    print(
        f"held-out loss {sum(pair[0] * n for pair, n in sums) / total:.4f} nats a token, "
        f"log Z rms {(sum(pair[1] * n for pair, n in sums) / total) ** 0.5:.2f}"
    )
    model.model["norm"].weight.data *= SHARPNESS
    check(config, model)
    torch.save(
        {"config": dataclasses.asdict(config), "vocabulary": dataclasses.asdict(words), "weights": model.state_dict()},
        options.out,
    )
    print(f"wrote {options.out} after {(time.time() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
