"""The vocabulary: SentencePiece BPE as Phi-3 has it, and the Hugging Face tokenizer over the same pieces.

Ids: <unk>, <s>, </s>, the 256 bytes, the pieces, Phi-3's eleven special tokens in their order, [PADn] up to a multiple
of 32. Text is cut as Hugging Face's Phi-3 tokenizer cuts it: special tokens first (with the white space after them), then
"\u2581" before each remaining segment, spaces to "\u2581", BPE merges, and bytes for what no piece spells.
"""

import io
from dataclasses import dataclass

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

SPACE = "\u2581"
DASH = "\u2014"
SPECIAL = [
    "<|endoftext|>",
    "<|assistant|>",
    "<|placeholder1|>",
    "<|placeholder2|>",
    "<|placeholder3|>",
    "<|placeholder4|>",
    "<|system|>",
    "<|end|>",
    "<|placeholder5|>",
    "<|placeholder6|>",
    "<|user|>",
]
NORMAL, UNKNOWN, CONTROL, UNUSED, BYTE = 1, 2, 3, 5, 6  # the token types of GGUF


@dataclass
class Vocabulary:
    tokens: list[str]
    scores: list[float]
    types: list[int]

    def id(self, token: str) -> int:
        return self.tokens.index(token)


def train(segments: list[str], pieces: int) -> Vocabulary:
    """Learns `pieces` pieces, the single characters included, from segments of plain text.

    A segment is what stands between two special tokens. Its first line starts with a "\u2581"; its other lines do not,
    for the newline is a byte to the tokenizer. SentencePiece is therefore given lines, the first of a segment after a
    space; lines with emoji, kanji or accents are left out, so that these are spelled in bytes.
    """
    ascii = [chr(code) for code in range(33, 127)]
    known = {" ", DASH, *ascii}
    lines = [line for segment in segments for line in (" " + segment).split("\n") if line and known.issuperset(line)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=259 + pieces,
        byte_fallback=True,
        character_coverage=1.0,
        required_chars="".join(ascii),
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    learned = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(learned.vocab_size())
    tokens = [learned.id_to_piece(i) for i in ids]
    scores = [learned.get_score(i) for i in ids]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE if learned.is_byte(i) else NORMAL for i in ids[3:]]
    tokens += SPECIAL
    pads = 32 - len(tokens) % 32  # at least one, as real files have
    tokens += [f"[PAD{len(tokens) + n}]" for n in range(pads)]
    scores += [-1000.0] * len(SPECIAL) + [-10000.0] * pads
    types += [CONTROL] * len(SPECIAL) + [UNUSED] * pads
    return Vocabulary(tokens, scores, types)


def merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """The merges behind the pieces: every split of a piece into two known ones; the best-scored pieces first."""
    end = vocabulary.id(SPECIAL[0])
    known = {token: i for i, token in enumerate(vocabulary.tokens[:end])}
    found = []
    for token, score, kind in zip(vocabulary.tokens, vocabulary.scores, vocabulary.types, strict=True):
        if kind != NORMAL:
            continue
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        splits = [
            (known[left], known[right], left, right) for left, right in splits if left in known and right in known
        ]
        found += [(score, left, right) for _, _, left, right in sorted(splits)]
    found.sort(key=lambda merge: -merge[0])  # stable
    return [(left, right) for _, left, right in found]


def tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """What Hugging Face's Phi-3 tokenizer is, with these pieces."""
    end = vocabulary.id(SPECIAL[0])
    bpe = models.BPE(
        vocab={token: i for i, token in enumerate(vocabulary.tokens[:end])},
        merges=merges(vocabulary),
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    result = Tokenizer(bpe)
    result.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    result.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bare = {"<unk>", "<s>", "<|endoftext|>"}
    result.add_special_tokens([AddedToken(t, normalized=False, rstrip=t not in bare) for t in ("<unk>", "<s>")])
    result.add_tokens([AddedToken("</s>", normalized=False, rstrip=True)])
    result.add_special_tokens([AddedToken(t, normalized=False, rstrip=t not in bare) for t in SPECIAL])
    return result
