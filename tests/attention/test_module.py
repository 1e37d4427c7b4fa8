import ast
import copy
import sys
from pathlib import Path

import pytest
import timm.layers
import torch
from detectron2.modeling.backbone.utils import add_decomposed_rel_pos
from detectron2.modeling.backbone.vit import Attention as Detectron2Attention

import karat_det.attention
from karat_det.attention import Bias, KArAtAttention, KArAtConfig, KArAtOperator
from karat_det.attention.module import rel_pos_terms

# Softmax plus nothing: with it the module must equal the softmax one that it stands in for.
SOFTMAX = KArAtConfig(rank=2, residual="softmax")


def on_grid(**fields):
    """An attention of 2 × 3 tokens with relative positions."""
    operator = KArAtOperator(2, 6, KArAtConfig(**{"rank": 2, **fields}))
    return KArAtAttention(8, 2, operator, use_rel_pos=True, input_size=(2, 3))


def test_attention_imports_torch_and_nothing_else_but_triton_in_its_back_end():
    folder = Path(karat_det.attention.__file__).parent
    for path in folder.rglob("*.py"):
        allowed = {"torch", *sys.stdlib_module_names} | ({"triton"} if path.name == "triton.py" else set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, path
            elif isinstance(node, ast.ImportFrom):
                levels = len(path.relative_to(folder).parts)
                assert 0 < node.level <= levels or node.module.split(".")[0] in allowed, path


@pytest.mark.parametrize("use_rel_pos", [False, True])
def test_equals_detectron2s_attention_with_its_weights(use_rel_pos):
    torch.manual_seed(0)
    theirs = Detectron2Attention(24, num_heads=3, use_rel_pos=use_rel_pos, rel_pos_zero_init=False, input_size=(3, 5))
    ours = KArAtAttention(24, 3, KArAtOperator(3, 15, SOFTMAX), use_rel_pos=use_rel_pos, input_size=(3, 5))
    incompatible = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not incompatible.unexpected_keys
    assert incompatible.missing_keys == ["operator.coefficients", "operator.projector"]
    x = torch.randn(2, 3, 5, 24)
    torch.testing.assert_close(ours(x), theirs(x))


def test_equals_timms_attention_in_a_timm_block():
    torch.manual_seed(1)
    block = timm.models.vision_transformer.Block(24, num_heads=3, qkv_bias=True)
    x = torch.randn(2, 17, 24)
    expected = block(x)
    replacement = KArAtAttention(24, 3, KArAtOperator(3, 17, SOFTMAX))
    replacement.load_state_dict(block.attn.state_dict(), strict=False)
    block.attn = replacement
    torch.testing.assert_close(block(x), expected)
    plain = timm.layers.Attention(24, num_heads=3, qkv_bias=True)
    replacement.load_state_dict(plain.state_dict(), strict=False)
    for mask in (torch.randn(2, 1, 17, 17), (torch.rand(2, 1, 17, 17) > 0.5) | torch.eye(17, dtype=torch.bool)):
        torch.testing.assert_close(replacement(x, attn_mask=mask), plain(x, attn_mask=mask))


def test_what_softmax_alone_can_do_is_refused():
    attention = KArAtAttention(8, 2, KArAtOperator(2, 4, KArAtConfig(rank=2)))
    with pytest.raises(ValueError, match="is_causal is True"):
        attention(torch.zeros(1, 4, 8), is_causal=True)


@pytest.mark.parametrize("grid", [(4, 4), (2, 7), (5, 1)])
def test_relative_positions_equal_detectron2s(grid):
    torch.manual_seed(2)
    num_tokens = grid[0] * grid[1]
    query = torch.randn(2, 3, num_tokens, 6)
    # Detectron2 resizes tables unless both sides of the grid are as long: its expected length is 2 · side − 1.
    rel_pos_h, rel_pos_w = torch.randn(2 * grid[0] - 1, 6), torch.randn(2 * grid[1] - 1, 6)
    zeros = torch.zeros(6, num_tokens, num_tokens)
    expected = add_decomposed_rel_pos(zeros, query.reshape(6, num_tokens, 6), rel_pos_h, rel_pos_w, grid, grid)
    terms = rel_pos_terms(query, rel_pos_h, rel_pos_w)
    scores = torch.randn(2, 3, num_tokens, num_tokens)
    torch.testing.assert_close(Bias(None, *terms).add_to(scores), scores + expected.reshape_as(scores))


def test_relative_positions_learn():
    attention = on_grid()
    attention(torch.randn(1, 2, 3, 8)).square().sum().backward()
    assert attention.rel_pos_h.grad.abs().sum() > 0
    assert attention.rel_pos_w.grad.abs().sum() > 0


@pytest.mark.parametrize("fields", [{}, {"residual": "softmax"}, {"basis": "dog"}], ids=str)
def test_an_empty_batch_gives_nothing_and_no_gradients(fields):
    attention = on_grid(**fields)
    x = torch.randn(0, 2, 3, 8, requires_grad=True)
    attention(x).sum().backward()
    assert x.grad.shape == x.shape
    assert not any(parameter.grad.any() for parameter in attention.parameters() if parameter.grad is not None)


def test_a_model_of_half_precision_has_relative_positions_too():
    attention = on_grid().bfloat16()
    x = torch.randn(1, 2, 3, 8)
    output = attention(x.bfloat16())
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), attention.float()(x), atol=0.02, rtol=0.05)


def test_shared_operator_is_one_module_registered_by_its_owner_alone():
    owner = torch.nn.Module()
    owner.operator = KArAtOperator(2, 4, KArAtConfig(rank=2))
    owner.blocks = torch.nn.ModuleList(KArAtAttention(8, 2, owner.operator, shares_operator=True) for _ in range(3))
    assert all(block.operator is owner.operator for block in owner.blocks)
    assert [key for key in owner.state_dict() if "coefficients" in key] == ["operator.coefficients"]
    assert sum("projector" in name for name, _ in owner.named_parameters(remove_duplicate=False)) == 1
    twin = copy.deepcopy(owner)
    assert all(block.operator is twin.operator for block in twin.blocks)
    assert twin.operator is not owner.operator


def test_sizes_that_do_not_fit_are_refused():
    operator = KArAtOperator(2, 4, KArAtConfig(rank=2))
    with pytest.raises(ValueError, match="num_heads is 3, which does not divide dim, 8"):
        KArAtAttention(8, 3, operator)
    message = r"operator is for 2 heads and N = 4 tokens, .* {0} heads and N = {1}\. Give it a KArAtOperator\({0}, {1}"
    with pytest.raises(ValueError, match=message.format(4, 4)):
        KArAtAttention(8, 4, operator)
    for arguments in ({"use_rel_pos": True, "input_size": (2, 3)}, {"input_size": (3, 2)}):
        with pytest.raises(ValueError, match=message.format(2, 6)):
            KArAtAttention(8, 2, operator, **arguments)
    with pytest.raises(ValueError, match="N = 3"):  # relative positions are of all tokens
        KArAtAttention(8, 2, operator, use_rel_pos=True, input_size=(3, 1))
    with pytest.raises(ValueError, match=r"input_size is None. With use_rel_pos it must be the \(H, W\)"):
        KArAtAttention(8, 2, operator, use_rel_pos=True)
    with pytest.raises(ValueError, match="N = 4 tokens and got 9"):
        KArAtAttention(8, 2, operator, input_size=(3, 1))(torch.zeros(1, 9, 8))
    with pytest.raises(ValueError, match=r"N = 6 tokens and got 12.*MODEL.VIT.IMG_SIZE"):
        on_grid()(torch.zeros(1, 3, 4, 8))


@pytest.mark.parametrize(
    "fields",
    [
        {"base_function": "gelu"},
        {"residual": "softmax"},
        {"basis": "rational", "residual": "softmax", "num_karat_heads": 1},
        {"basis": "dog", "order": "two_operators", "projection": "simplex"},
    ],
    ids=str,
)
def test_attention_compiles_without_a_graph_break_to_the_same_outputs_and_gradients(fields):
    torch.manual_seed(3)
    torch.compiler.reset()
    attention = on_grid(**fields)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    x = torch.randn(1, 2, 3, 8, requires_grad=True)
    # This backend traces forward and backward as the compiler does, and needs no compiler.
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    learning = [x, *attention.parameters()]
    outputs = [compiled(x), attention(x)]
    torch.testing.assert_close(*outputs)
    gradients = [torch.autograd.grad(output.square().sum(), learning) for output in outputs]
    for gradient, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)
