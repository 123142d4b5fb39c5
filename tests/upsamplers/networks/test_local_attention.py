import pytest
import torch
from torch import Tensor

from upsamplers.networks.local_attention import LocalSelfAttention, alibi_slopes, local_attention

GRIDS = [(6, 6), (5, 17), (1, 3), (9, 20), (13, 7)]


def projected(
    grid: tuple[int, int], heads: int = 3, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (2, heads, *grid, 4)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3)]


def reference(query: Tensor, key: Tensor, value: Tensor, window: int, alibi: bool) -> Tensor:
    """Every pair of cells, masked."""
    grid = query.shape[2:4]
    places = torch.cartesian_prod(*map(torch.arange, grid))
    rows, columns = (places[:, None] - places).abs().movedim(-1, 0)  # [N, N]
    query, key, value = (part.flatten(2, 3) for part in (query, key, value))
    logits = query @ key.mT * query.shape[-1] ** -0.5
    if alibi:
        down, right = alibi_slopes(query.shape[1])[..., None, None]
        logits = logits - down * rows - right * columns
    far = torch.maximum(rows, columns) > window // 2
    return (logits.masked_fill(far, -torch.inf).softmax(-1) @ value).unflatten(2, grid)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("window", [1, 3, 5, 7, 9, 11])
@pytest.mark.parametrize("alibi", [False, True])
def test_local_attention__is_that_of_every_pair_masked(grid, window, alibi):
    tensors = [x.requires_grad_() for x in projected(grid)]
    weight = torch.randn(2, 3, *grid, 4, dtype=torch.float64)
    outcomes = []
    for form in (reference, local_attention):
        out = form(*tensors, window, alibi)
        gradients = torch.autograd.grad((out * weight).sum(), tensors, materialize_grads=True)
        outcomes.append([out, *gradients])
    for expected, got in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("alibi", [False, True])
def test_local_attention__gradcheck(alibi):
    tensors = [x[:1, :2].clone().requires_grad_() for x in projected((3, 8))]
    assert torch.autograd.gradcheck(lambda q, k, v: local_attention(q, k, v, 3, alibi), tensors)


def test_local_attention__values_may_be_of_another_width():
    query, key, value = projected((6, 7))
    wide = torch.cat([value, 2 * value], dim=-1)
    out = local_attention(query, key, wide, 5)
    torch.testing.assert_close(out[..., 4:], 2 * out[..., :4])
    torch.testing.assert_close(out[..., :4], local_attention(query, key, value, 5))


def test_local_attention__a_cell_beyond_the_window_has_no_influence():
    query, key, value = (x.requires_grad_() for x in projected((20, 20)))
    local_attention(query, key, value, 5)[:, :, 10, 10].sum().backward()
    rows, columns = value.grad.abs().sum((0, 1, 4)).nonzero().T
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (8, 12, 8, 12)


def test_local_attention__a_nan_stays_near_and_in_its_image():
    query, key, value = projected((40, 40))
    key[0, :, 20, 20] = torch.nan
    bad = local_attention(query, key, value, 5).isnan().any(-1).any(1)  # [B, h, w]
    assert not bad[1].any()
    assert bad[0, 18:23, 18:23].all()  # nothing hides it from those who look at it
    rows, columns = bad[0].nonzero().T
    reach = 2 + 6  # the window's radius and a block
    assert max((rows - 20).abs().max(), (columns - 20).abs().max()) <= reach


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_local_attention__half_precision_is_close(dtype):
    tensors = projected((9, 11), dtype=torch.float32)
    expected = local_attention(*tensors, 5, alibi=True)
    out = local_attention(*(x.to(dtype) for x in tensors), 5, alibi=True)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, atol=0.05, rtol=0)


def test_local_attention__logits_beyond_half_precision_do_not_overflow():
    query, key, value = (x.half() for x in projected((6, 6), dtype=torch.float32))
    query, key = query * 1000, key * 1000  # logits up to 1e6, where fp16 ends at 65504
    out = local_attention(query, key, value, 3)
    expected = local_attention(query.float(), key.float(), value.float(), 3)
    torch.testing.assert_close(out.float(), expected, atol=0.01, rtol=0)


def test_alibi_slopes__alternate_between_rows_and_columns():
    assert alibi_slopes(5).tolist() == [[0.5, 0, 0.25, 0, 0.125], [0, 0.5, 0, 0.25, 0]]


@pytest.mark.parametrize(("width", "heads"), [(768, 16), (48, 16), (20, 10), (14, 14), (34, 2)])
def test_local_self_attention__number_of_heads(width, heads):
    assert LocalSelfAttention(width, width, window=3).num_heads == heads


def test_local_self_attention__pads_queries_and_keys_alone():
    padded = LocalSelfAttention(2 * 72, 72, window=3, pad_heads=True)  # 16 heads of 9
    assert padded.parts == [16 * 16, 16 * 16, 144]
    assert LocalSelfAttention(144, 72, window=3).parts == [144, 144, 144]
