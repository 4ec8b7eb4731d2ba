"""What a server counted, and how it is shared by requests."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from adaptspec_plugins.engines.vllm.counters import Counters, shared

# As vLLM 0.32 prints them, shortened, with two engines.
PAGE = """\
# HELP vllm:generation_tokens_total Number of generation tokens processed.
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="/models/a b"} 40.0
vllm:generation_tokens_total{engine="1",model_name="/models/a b"} 2.0
# HELP vllm:generation_tokens_created Number of generation tokens processed.
# TYPE vllm:generation_tokens_created gauge
vllm:generation_tokens_created{engine="0",model_name="/models/a b"} 1.76e+09
# HELP vllm:spec_decode_num_draft_tokens_total Number of draft tokens.
# TYPE vllm:spec_decode_num_draft_tokens_total counter
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="/models/a b"} 1e+02
# HELP vllm:spec_decode_num_accepted_tokens_total Number of accepted tokens.
# TYPE vllm:spec_decode_num_accepted_tokens_total counter
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="/models/a b"} 30.0
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos_total counter
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="0"} 20.0
"""


def test_counters_are_summed_over_engines_and_others_are_left_out() -> None:
    assert Counters.read(PAGE) == Counters(42, 100, 30)


def test_a_server_without_speculation_has_counted_none() -> None:
    plain = "vllm:generation_tokens_total 3.0\n"
    assert Counters.read(plain) == Counters(3, 0, 0)
    assert Counters.read(PAGE).since(Counters.read(plain)) == Counters(39, 100, 30)


@given(st.integers(0, 1000), st.lists(st.integers(0, 200), max_size=8))
def test_parts_are_the_whole_and_within_one_of_their_share(
    total: int, weights: list[int]
) -> None:
    parts = shared(total, weights)
    assert len(parts) == len(weights)
    if not sum(weights):
        assert parts == [0] * len(weights)
        return
    assert sum(parts) == total
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part - total * weight / sum(weights)) < 1
