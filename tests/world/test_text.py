"""The world's text encoder: 512 rows of 4096, zero after the prompt."""

import pytest
import torch
from sparse_forcing_pack.sparse_attn.world.scene import VOCABULARY
from sparse_forcing_pack.sparse_attn.world.text import UNKNOWN, WorldTextEncoder, tokenize

PROMPT = "a large red circle bouncing over a navy plain background"


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return WorldTextEncoder(dim=32).eval().requires_grad_(False)


def test_rows_are_zero_after_each_prompt(encoder):
    rows = encoder.encode([PROMPT, "a red circle"])
    assert rows.shape == (2, 512, 4096)
    for row, words in zip(rows, (10, 3)):
        assert row[:words].abs().amax(1).min() > 0
        assert not row[words:].any()


def test_a_prompt_does_not_feel_the_others_of_its_batch(encoder):
    alone, longer = encoder.encode(["a red circle"])[0], encoder.encode(["a red circle", PROMPT])[0]
    torch.testing.assert_close(longer, alone, atol=1e-5, rtol=1e-5)


def test_every_word_has_its_own_token():
    ids = tokenize(" ".join(VOCABULARY))
    assert len(set(ids)) == len(VOCABULARY)
    assert min(ids) > UNKNOWN


@pytest.mark.parametrize(
    "prompt", ["", "!", "Ein Hund rennt, 3 Katzen!", "\u6c34\u5f69 \U0001f3ac", "circle " * 600]
)
def test_free_text_works(encoder, prompt):
    rows = encoder.encode([prompt])
    assert rows.shape == (1, 512, 4096)
    assert rows.isfinite().all()
    assert rows[0, 0].any()


def test_unknown_words_share_one_token_and_long_prompts_are_cut():
    assert tokenize("A red, DRAGON wizard") == [*tokenize("a red"), UNKNOWN, UNKNOWN]
    assert len(tokenize("circle " * 600)) == 512


def test_order_counts(encoder):
    one, other = encoder.encode(["a red circle and a blue star", "a blue circle and a red star"])
    assert not torch.allclose(one[2], other[2], atol=1e-3)  # the first shape


def test_weights_build_their_encoder(encoder):
    again = WorldTextEncoder.from_state_dict(encoder.state_dict())
    assert torch.equal(again.encode([PROMPT]), encoder.encode([PROMPT]))


def test_the_embedded_encoder(world):
    rows = world.text.encode([PROMPT])
    assert rows.shape == (1, 512, 4096) and rows.isfinite().all()
    assert rows[0, :10].any() and not rows[0, 10:].any()
