"""The sizes of a model's dims, and the roles of the parameters that it has."""

from collections.abc import Mapping

from gshard_moe import config
from gshard_moe.layout import notation


def letter_sizes(
    model: config.ModelConfig, batch_size: int | None = None, seq_len: int | None = None
) -> dict[str, int]:
    """Returns the size of every letter that the model has; arguments as in `Layout.check`."""
    train = model.train
    sizes = {
        "B": train.microbatch_size if batch_size is None else batch_size,
        "L": train.seq_len if seq_len is None else seq_len,
        "M": model.model_dim,
        "N": model.num_heads,
        "J": model.num_kv_heads,
        "D": model.head_dim,
        "V": model.vocab_size,
        "W": model.max_positions,
    }
    if not all(model.is_moe_block(i) for i in range(model.num_layers)):
        sizes["F"] = model.dense_hidden_dim
    if model.moe is not None:
        moe = model.moe.grouped((sizes["B"], sizes["L"]), train=True)
        sizes |= {
            "G": sizes["B"] * sizes["L"] // moe.group_size,
            "S": moe.group_size,
            "E": moe.num_experts,
            "C": moe.slots(train=True),
            "K": moe.top_k,
            "H": moe.hidden_dim,
            "R": sizes["B"] * sizes["L"] * moe.top_k,
        }
        if moe.shared_hidden_dim:
            sizes["U"] = moe.shared_hidden_dim
    return sizes


def parameters_of(model: config.ModelConfig) -> list[str]:
    """Returns the roles of the parameters that the model has."""
    moe = model.moe
    blocks = {model.is_moe_block(i) for i in range(model.num_layers)}
    present = {
        "head": not model.tied_embeddings,
        "positions": model.positions == "learned",
        "head_norm": model.qk_norm,
        "query_bias": model.bias,
        "key_value_bias": model.bias,
        "router": True in blocks,
        "router_bias": moe is not None and (moe.router_bias or moe.selection_bias),
        "expert_in": True in blocks,
        "expert_out": True in blocks,
        "expert_in_bias": moe is not None and moe.bias,
        "expert_out_bias": moe is not None and moe.bias,
        "shared_in": moe is not None and moe.shared_hidden_dim > 0,
        "shared_out": moe is not None and moe.shared_hidden_dim > 0,
        "dense_in": False in blocks,
        "dense_in_bias": False in blocks and model.bias,
        "dense_out": False in blocks,
    }
    return [role for role in notation.PARAMETERS if present.get(role, True)]


def misfits(model: config.ModelConfig, sizes: Mapping[str, int], source: str) -> list[str]:
    """Returns the faults of a batch that no layout could hold."""
    batch, length = sizes["B"], sizes["L"]
    got = f"got batch_size={batch}, seq_len={length}"
    if min(batch, length) < 1:
        return [f"the batch must not be empty; {got}"]
    faults = []
    if length > model.max_positions:
        faults.append(
            f"seq_len must be at most max_positions; {got}, max_positions={model.max_positions} "
            f"({source})"
        )
    moe = None if model.moe is None else model.moe.grouped((batch, length), train=True)
    if moe is not None and batch * length % moe.group_size:
        faults.append(
            f"group_size must divide the tokens of a forward pass; {got}, "
            f"tokens={batch * length}, group_size={moe.group_size} ({source})"
        )
    return faults


def chunk_fault(chunks: int, local_experts: int, capacity: int, by: config.ChunkBy = "auto") -> str:
    """Says if slots are to be cut into more chunks than there are; empty if not."""
    most = {
        "auto": max(local_experts, capacity),
        "expert": local_experts,
        "capacity": capacity,
    }
    if chunks <= most[by]:
        return ""
    of = {
        "auto": "a device's experts, or the slots of an expert in a group (C)",
        "expert": 'a device\'s experts, with chunk_by = "expert"',
        "capacity": 'the slots of an expert in a group (C), with chunk_by = "capacity"',
    }
    return (
        f"exchange.chunks: must be at most {of[by]}; "
        f"got chunks={chunks}, experts on a device={local_experts}, C={capacity}; use fewer "
        "chunks or larger groups"
    )
