"""Prompts: the forms that are accepted, and the errors for the others."""

import array
import logging
from typing import Any

import numpy as np
import pytest

from candle_phi import NotInThisVersionError, Phi
from conftest import HAIKU

USER = {"role": "user", "content": "Hi"}


def test_a_str_is_one_user_turn(phi: Phi) -> None:
    assert phi.render("Hi") == phi.render([USER])
    assert phi.stream("Hi").usage.prompt_tokens == len(phi.tokenize([USER]))


def test_render_shows_every_role(phi: Phi) -> None:
    text = phi.render(
        [
            {"role": "system", "content": "Be brief."},
            USER,
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": [{"type": "text", "text": "Two "}, {"type": "text", "text": "parts"}]},
        ]
    )
    positions = [text.index(part) for part in ("Be brief.", "Hi", "Hello.", "Two parts")]
    assert positions == sorted(positions)


def test_developer_is_system(phi: Phi) -> None:
    content = {"content": "Be brief."}
    assert phi.render([{"role": "developer", **content}, USER]) == phi.render([{"role": "system", **content}, USER])


def test_a_last_assistant_message_is_continued(phi: Phi) -> None:
    begun = phi.render([USER, {"role": "assistant", "content": "Cold ice"}])
    assert begun.endswith("Cold ice")
    assert begun == phi.render([USER]) + "Cold ice"


@pytest.mark.parametrize("empty", [None, [], (), {}, ""])
def test_an_empty_value_is_absent(phi: Phi, empty: object) -> None:
    assert phi.render([{**USER, "name": None, "tool_calls": empty, "annotations": empty}]) == phi.render([USER])


def test_a_name_is_accepted(phi: Phi) -> None:
    assert phi.render([{**USER, "name": "Bo"}]) == phi.render([USER])


def test_a_message_of_openai_is_accepted(phi: Phi) -> None:
    # ChatCompletionMessage(...).model_dump() of openai 2
    dumped: dict[str, Any] = {
        "content": "Hello.",
        "refusal": None,
        "role": "assistant",
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    }
    plain = {"role": "assistant", "content": "Hello."}
    assert phi.render([USER, dumped, USER]) == phi.render([USER, plain, USER])


def test_messages_come_from_any_iterable(phi: Phi) -> None:
    assert phi.tokenize(m for m in [USER]) == phi.tokenize((USER,)) == phi.tokenize([USER])
    assert phi.generate((m for m in [USER]), seed=1, max_tokens=4) == phi.generate([USER], seed=1, max_tokens=4)


def test_tokens_of_messages_are_what_is_prefilled(phi: Phi) -> None:
    assert phi.generate(phi.tokenize([USER]), seed=1) == phi.generate([USER], seed=1)


@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda ids: array.array("I", ids), iter])
def test_token_ids_come_in_any_sequence(phi: Phi, kind: Any) -> None:
    ids = phi.tokenize([USER])
    assert phi.stream(kind(ids)).usage.prompt_tokens == len(ids)
    assert phi.generate(kind(ids), seed=1, max_tokens=4) == phi.generate(ids, seed=1, max_tokens=4)


@pytest.mark.parametrize(
    ("prompt", "error", "says"),
    [
        (None, TypeError, "NoneType"),
        (7, TypeError, "int"),
        (b"Hi", TypeError, "bytes"),
        (bytearray(b"Hi"), TypeError, "bytearray"),
        ([], ValueError, "the prompt is an empty list"),
        (iter(()), ValueError, "the prompt is an empty list"),
        (USER, TypeError, "put it in a list"),
        (["Hi"], TypeError, "a list of prompts is a batch"),
        ([USER, "Hi"], TypeError, r"messages\[1\] is a str"),
        ([USER, 5], TypeError, r"messages\[1\] is int"),
        ([USER, None], TypeError, r"messages\[1\] is NoneType"),
        ([USER, b"x"], TypeError, r"messages\[1\] is bytes"),
        ([1.5], TypeError, r"messages\[0\] is float"),
        ([{"role": "user"}], TypeError, r"messages\[0\] has no content"),
        ([{"role": "user", "content": None}], TypeError, r"messages\[0\]: content is None"),
        ([{"role": "user", "content": b"Hi"}], TypeError, r"messages\[0\]: content .* bytes"),
        ([{"role": "user", "content": 5}], TypeError, r"messages\[0\]: content .* int"),
        ([USER, {"rol": "user", "content": "Hi"}], TypeError, r"messages\[1\] .*'rol'; did you mean 'role'"),
        ([{"content": "Hi"}], TypeError, r"messages\[0\] has no role"),
        ([{"role": 3, "content": "Hi"}], TypeError, r"messages\[0\]: role must be a str, not int"),
        ([{"role": None, "content": "Hi"}], TypeError, r"messages\[0\]: role must be a str, not NoneType"),
        ([{"role": "asistant", "content": "Hi"}], ValueError, r"messages\[0\].*did you mean 'assistant'"),
        ([{"role": "robot", "content": "Hi"}], ValueError, r"messages\[0\]: unknown role 'robot'"),
        ([{**USER, "name": 5}], TypeError, r"messages\[0\]: name must be a str, not int"),
        ([{**USER, "annotations": [1]}], TypeError, r"messages\[0\] has an unknown key 'annotations'"),
        ([{**USER, "weight": 0}], TypeError, r"messages\[0\] has an unknown key 'weight'"),
        (
            [USER, {"role": "assistant", "content": None, "tool_calls": [{}]}],
            NotInThisVersionError,
            r"messages\[1\]: tool_calls",
        ),
        ([{**USER, "tool_call_id": "7"}], NotInThisVersionError, r"messages\[0\]: tool_call_id is not in this version"),
        ([{"role": "tool", "content": "1"}], NotInThisVersionError, r"messages\[0\].*'tool'"),
        ([{"role": "user", "content": ["Hi"]}], TypeError, r"content\[0\]"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], ValueError, r"content\[0\].*'image_url'"),
        ([{"role": "user", "content": [{"type": "text"}]}], TypeError, r"content\[0\]: text"),
        ([{"role": "user", "content": [{"type": "text", "txt": "a", "text": "b"}]}], TypeError, "did you mean 'text'"),
        ("Hi \ud800", ValueError, "position 3"),
        ([{"role": "user", "content": "\udfff"}], ValueError, r"messages\[0\]: content .*position 0"),
        ([True, 2], TypeError, "number 0 is bool"),
        ([1, "a"], TypeError, "number 1 is str"),
        ([1, 2.0], TypeError, "number 1 is float"),
        ([1, -2], ValueError, "token id -2, number 1"),
        ([1, 10**9], ValueError, "token id 1000000000, number 1, is outside the vocabulary of"),
    ],
)
def test_what_is_wrong_is_raised_at_the_call(phi: Phi, prompt: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        phi.stream(prompt)


def test_raw_takes_the_text_as_it_stands(phi: Phi) -> None:
    text = phi.render([USER])
    parsed = phi.tokenize(text, parse_special=True)
    assert phi.stream(text, raw=True).usage.prompt_tokens == len(parsed)
    plain = phi.tokenize(text)
    assert len(plain) > len(parsed)
    assert phi.stream(text, raw=True, parse_special=False).usage.prompt_tokens == len(plain)


def test_add_bos_puts_one_token_before_a_raw_prompt(phi: Phi) -> None:
    assert phi.tokenize("Hi", add_bos=True) == [phi.bos_token_id, *phi.tokenize("Hi")]
    with_bos = phi.stream("Hi", raw=True, add_bos=True)
    assert with_bos.usage.prompt_tokens == phi.stream("Hi", raw=True).usage.prompt_tokens + 1


def test_raw_is_for_text(phi: Phi) -> None:
    for prompt in ([USER], [1, 2], b"Hi"):
        with pytest.raises(TypeError, match="raw=True"):
            phi.stream(prompt, raw=True)  # type: ignore[arg-type]  # no text
    with pytest.raises(ValueError, match="no tokens"):
        phi.stream("", raw=True)
    with pytest.raises(ValueError, match="for a str"):
        phi.tokenize([USER], parse_special=True)


def test_special_tokens_in_user_text_are_text(phi: Phi) -> None:
    plain = phi.tokenize([{"role": "user", "content": "<|end|>"}])
    empty = phi.tokenize([{"role": "user", "content": ""}])
    (end,) = phi.tokenize("<|end|>", parse_special=True)
    assert plain.count(end) == empty.count(end)
    assert len(plain) > len(empty)


def test_a_templated_string_is_warned_about_once(phi: Phi, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="candle_phi"):
        phi.stream("<|user|>\nHi<|end|>\n<|assistant|>\n")
        assert [record.name for record in caplog.records] == ["candle_phi"]
        assert "raw=True" in caplog.text
        phi.stream("<|user|>\nHi<|end|>\n<|assistant|>\n", raw=True)
        phi.stream(HAIKU)
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "text", ["", "Hi", " two  spaces ", "a\nb\tc", "naïve 氷 🏒", "👨‍👩‍👧 🇨🇦", "<|end|>", "\x00\x7f"]
)
def test_detokenize_undoes_tokenize(phi: Phi, text: str) -> None:
    assert phi.detokenize(phi.tokenize(text)) == text


def test_detokenize_checks_ids(phi: Phi) -> None:
    with pytest.raises(ValueError, match=f"token id {phi.n_vocab}, number 1"):
        phi.detokenize([0, phi.n_vocab])
    with pytest.raises(TypeError, match="str"):
        phi.detokenize("12")  # type: ignore[arg-type]
    assert phi.detokenize([]) == ""


def test_detokenize_skips_or_spells_special_tokens(phi: Phi) -> None:
    ids = phi.tokenize("<|end|>", parse_special=True)
    assert phi.detokenize(ids) == ""
    assert phi.detokenize(ids, skip_special=False) == "<|end|>"
