# nsa.c models in PyTorch: Native Sparse Attention (arXiv 2502.11089) as a transformers model.
#
# A copy of this file lies in every checkpoint folder, so that the folder alone loads:
#     AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
# dev/reference.py runs the same code in float64: it is the oracle the C and CUDA programs are tested
# against. So it is written to be read and trusted, not to be fast: attention is computed densely under
# masks, a chunk of queries at a time, and generation keeps no cache.
#
# Symbols: B batch, T length, C width, H query heads, KV key/value heads, G = H/KV, D head_dim of q and k,
# Dv of v, l cmp_block, d cmp_stride, s sel_block, n sel_blocks, w window, Nc compressed blocks,
# Ns = ceil(T/s) selection blocks. Equation numbers are the paper's.
import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

GATE_INIT = (-2.0, -2.0, 2.0)  # cmp, slc, win: the order of the branches everywhere
QUERY_CHUNK = 256              # queries attended to at a time; bounds the memory of the score matrices


class NSAConfig(PretrainedConfig):
    model_type = "nsa"

    def __init__(self, vocab_size=256, hidden_size=384, intermediate_size=1024, num_hidden_layers=6,
                 num_attention_heads=6, num_key_value_heads=6, head_dim=64, v_head_dim=64,
                 max_position_embeddings=1024, rope_theta=10000.0, rms_norm_eps=1e-5, tie_word_embeddings=True,
                 attention="nsa", full_layers=(), cmp_block=32, cmp_stride=16, sel_block=64, sel_blocks=16,
                 sel_init_blocks=1, sel_local_blocks=2, window=512, compress="mlp", gate="input",
                 num_experts=0, num_shared_experts=0, num_experts_per_tok=0, moe_intermediate_size=0,
                 first_dense_layers=0, capacity_factor=0.0, z_loss_coef=1e-3, balance_loss_coef=1e-2, **kwargs):
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads, self.num_key_value_heads = num_attention_heads, num_key_value_heads
        self.head_dim, self.v_head_dim = head_dim, v_head_dim
        self.max_position_embeddings, self.rope_theta = max_position_embeddings, rope_theta
        self.rms_norm_eps = rms_norm_eps
        self.attention, self.full_layers = attention, list(full_layers)
        self.cmp_block, self.cmp_stride = cmp_block, cmp_stride
        self.sel_block, self.sel_blocks = sel_block, sel_blocks
        self.sel_init_blocks, self.sel_local_blocks = sel_init_blocks, sel_local_blocks
        self.window, self.compress, self.gate = window, compress, gate
        self.num_experts, self.num_shared_experts = num_experts, num_shared_experts
        self.num_experts_per_tok, self.moe_intermediate_size = num_experts_per_tok, moe_intermediate_size
        self.first_dense_layers, self.capacity_factor = first_dense_layers, capacity_factor
        self.z_loss_coef, self.balance_loss_coef = z_loss_coef, balance_loss_coef
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

        def need(condition, what):
            if not condition:
                raise ValueError("NSA config: " + what)

        need(attention in ("nsa", "full"), "attention is nsa or full")
        need(compress in ("mlp", "grouped_mlp", "conv1d", "avgpool"), "compress is mlp, grouped_mlp, conv1d or avgpool")
        need(gate in ("input", "q_cond", "static"), "gate is input, q_cond or static")
        need(num_attention_heads % num_key_value_heads == 0, "num_key_value_heads must divide num_attention_heads")
        need(head_dim % 2 == 0, "head_dim must be even")
        need(cmp_block % cmp_stride == 0, "cmp_stride must divide cmp_block")
        need(sel_block % cmp_stride == 0, "cmp_stride must divide sel_block")
        need(cmp_block <= sel_block, "cmp_block must not exceed sel_block")
        need(sel_local_blocks >= 1, "sel_local_blocks must be at least 1")
        need(sel_blocks >= sel_init_blocks + sel_local_blocks, "sel_blocks must hold the initial and local blocks")
        need(window >= 1, "window must be at least 1")

    def layer_is_full(self, layer):
        return self.attention == "full" or layer in self.full_layers

    def layer_is_moe(self, layer):
        return self.num_experts > 0 and layer >= self.first_dense_layers


# ---------------------------------------------------------------------------------------------------------
# Functions without parameters

def up(x):
    # at least float32: norms, angles and softmaxes do not run in bfloat16
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rope(x, position, theta):
    # x (B,T,heads,D), position (T): rotates the pair (x_i, x_{i+D/2}) by position * theta^(-2i/D)
    D = x.shape[-1]
    frequency = theta ** (-torch.arange(0, D, 2, dtype=torch.float64, device=x.device) / D)
    angle = position.to(torch.float64)[:, None, None] * frequency
    cos, sin = angle.cos().to(up(x).dtype), angle.sin().to(up(x).dtype)
    a, b = up(x).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def attend(q, k, v, mask):
    # q (B,T,H,D), k (B,S,KV,D), v (B,S,KV,Dv), mask broadcasts to (B,KV,G,T,S), true where q sees k.
    # Query head h reads key head h // G. Returns o (B,T,H,Dv) and p (B,KV,G,T,S); a query that sees
    # nothing has p = 0 and o = 0.
    B, T, H, D = q.shape
    q = q.view(B, T, k.shape[2], -1, D)
    score = up(torch.einsum("btkgd,bskd->bkgts", q, k)) / math.sqrt(D)
    p = score.masked_fill(~mask, torch.finfo(score.dtype).min).softmax(-1) * mask
    o = torch.einsum("bkgts,bskv->btkgv", p.to(v.dtype), v)
    return o.reshape(B, T, H, v.shape[-1]), p


def overlap(Nc, Ns, l, d, s, device=None):
    # m (Nc,Ns) of eq. 9: how many of the l/d pieces of d tokens of compressed block i lie in selection
    # block j. For l=32, d=16, s=64 the column of j is 1,2,2,2,1 over i = 4j-1 .. 4j+3.
    piece = torch.arange(Nc, device=device)[:, None] + torch.arange(l // d, device=device)
    return F.one_hot(piece * d // s, Ns).sum(1)


def select_blocks(importance, t, n, n_init, n_local, s):
    # importance (B,KV,T,Ns), t (T) positions of the queries -> block_idx (B,KV,T,n), ascending, then -1.
    # Eqs. 11 and 12: first the forced blocks, then the most important; of equals the lower index.
    Ns = importance.shape[-1]
    j, own = torch.arange(Ns, device=t.device), (t // s)[:, None]
    candidate = j <= own
    forced = candidate & ((j < n_init) | (j > own - n_local))
    rank = importance.masked_fill(forced, math.inf).masked_fill(~candidate, -math.inf)
    index = rank.sort(dim=-1, descending=True, stable=True).indices[..., :n]
    index = index.masked_fill(index > own, Ns).sort(dim=-1).values  # not a candidate: to the end, then -1
    return F.pad(index.masked_fill(index == Ns, -1), (0, n - index.shape[-1]), value=-1)


def tokens_of_blocks(block_idx, S, s):
    # block_idx (B,KV,T,n) -> (B,KV,T,S), true where token belongs to one of the blocks
    Ns = (S + s - 1) // s
    taken = torch.zeros(*block_idx.shape[:-1], Ns + 1, dtype=torch.bool, device=block_idx.device)
    taken.scatter_(-1, block_idx.masked_fill(block_idx < 0, Ns), True)
    return taken[..., :Ns].repeat_interleave(s, dim=-1)[..., :S]


# ---------------------------------------------------------------------------------------------------------
# Layers

class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        y = up(x)
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class GroupedLinear(nn.Module):  # one linear map for each KV head
    def __init__(self, groups, size_in, size_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, size_out, size_in))
        self.bias = nn.Parameter(torch.empty(groups, size_out))

    def forward(self, x):  # (B,N,KV,in) -> (B,N,KV,out)
        return torch.einsum("bnki,koi->bnko", x, self.weight) + self.bias


class Compress(nn.Module):
    # phi of eq. 7: each block of l tokens at stride d becomes one key (or value)
    def __init__(self, config, dim):
        super().__init__()
        KV, l = config.num_key_value_heads, config.cmp_block
        self.kind, self.l, self.d = config.compress, l, config.cmp_stride
        if self.kind in ("mlp", "grouped_mlp"):
            self.pos = nn.Parameter(torch.empty(l, dim))
        if self.kind == "mlp":
            self.fc1, self.fc2 = nn.Linear(l * dim, 2 * dim), nn.Linear(2 * dim, dim)
        elif self.kind == "grouped_mlp":
            self.fc1, self.fc2 = GroupedLinear(KV, l * dim, 2 * dim), GroupedLinear(KV, 2 * dim, dim)
        elif self.kind == "conv1d":
            self.conv = GroupedLinear(KV, l * dim, dim)

    def forward(self, x):  # (B,T,KV,D) -> (B,Nc,KV,D)
        if x.shape[1] < self.l:
            return x[:, :0]
        block = x.unfold(1, self.l, self.d).transpose(-1, -2)  # (B,Nc,KV,l,D)
        if self.kind == "avgpool":
            return block.mean(-2)
        if self.kind == "conv1d":
            return self.conv(block.flatten(-2))
        return self.fc2(F.gelu(self.fc1((block + self.pos).flatten(-2)), approximate="tanh"))


class Gate(nn.Module):
    # a logit for each head and branch, (B,T,H,3): from q before RoPE (q_cond) or a number (static)
    def __init__(self, config, q_cond):
        super().__init__()
        if q_cond:
            self.weight = nn.Parameter(torch.empty(config.num_attention_heads, 3, config.head_dim))
        self.bias = nn.Parameter(torch.empty(config.num_attention_heads, 3))
        self.init_bias = GATE_INIT

    def forward(self, q):
        if hasattr(self, "weight"):
            return torch.einsum("bthd,hcd->bthc", q, self.weight) + self.bias
        return self.bias.expand(*q.shape[:2], -1, -1)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        C, H, KV = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        D, Dv = config.head_dim, config.v_head_dim
        self.config, self.full = config, config.layer_is_full(layer)
        self.q_proj = nn.Linear(C, H * D, bias=False)
        self.o_proj = nn.Linear(H * Dv, C, bias=False)
        self.o_proj.init_scale = 1 / math.sqrt(2 * config.num_hidden_layers)
        for branch in ("",) if self.full else ("cmp_", "slc_", "win_"):  # every branch has its own k and v
            setattr(self, "k_" + branch + "proj", nn.Linear(C, KV * D, bias=False))
            setattr(self, "v_" + branch + "proj", nn.Linear(C, KV * Dv, bias=False))
        if self.full:
            return
        self.compress_k, self.compress_v = Compress(config, D), Compress(config, Dv)
        if config.gate == "input":
            self.g_proj = nn.Linear(C, 3 * H)
            self.g_proj.init_bias = GATE_INIT
        elif config.gate == "q_cond":
            self.gate_q = Gate(config, q_cond=True)
        else:
            self.gate = Gate(config, q_cond=False)

    def heads(self, x, proj):  # (B,T,C) -> (B,T,KV,D or Dv)
        return proj(x).unflatten(-1, (self.config.num_key_value_heads, -1))

    def forward(self, x, note):  # x (B,T,C), normalised
        c, T, device = self.config, x.shape[1], x.device
        position = torch.arange(T, device=device)
        q_plain = self.q_proj(x).unflatten(-1, (c.num_attention_heads, c.head_dim))
        q = rope(q_plain, position, c.rope_theta)
        chunks = [(a, min(a + QUERY_CHUNK, T)) for a in range(0, T, QUERY_CHUNK)]

        if self.full:
            k, v = rope(self.heads(x, self.k_proj), position, c.rope_theta), self.heads(x, self.v_proj)
            o = [attend(q[:, a:b], k[:, :b], v[:, :b], position[:b] <= position[a:b, None])[0] for a, b in chunks]
            return self.o_proj(torch.cat(o, 1).flatten(2))

        # compressed first, then rotated at the position of the block's first token
        k_cmp = self.compress_k(self.heads(x, self.k_cmp_proj))
        v_cmp = self.compress_v(self.heads(x, self.v_cmp_proj))
        Nc, Ns = k_cmp.shape[1], (T + c.sel_block - 1) // c.sel_block
        first = torch.arange(Nc, device=device) * c.cmp_stride
        k_cmp = rope(k_cmp, first, c.rope_theta)
        k_slc, v_slc = rope(self.heads(x, self.k_slc_proj), position, c.rope_theta), self.heads(x, self.v_slc_proj)
        k_win, v_win = rope(self.heads(x, self.k_win_proj), position, c.rope_theta), self.heads(x, self.v_win_proj)
        m = overlap(Nc, Ns, c.cmp_block, c.cmp_stride, c.sel_block, device)
        if c.gate == "input":
            gate = self.g_proj(x).unflatten(-1, (-1, 3))
        else:
            gate = (self.gate_q if c.gate == "q_cond" else self.gate)(q_plain)
        gate = gate.sigmoid()  # (B,T,H,3)

        outputs, importances, block_idxs = [], [], []
        for a, b in chunks:
            t = position[a:b, None]
            o_cmp, p = attend(q[:, a:b], k_cmp, v_cmp, first + c.cmp_block - 1 <= t)
            importance = (p.detach() @ m.to(p.dtype)).sum(2)  # eqs. 9 and 10, summed over the G heads: (B,KV,T,Ns)
            block_idx = select_blocks(importance, t[:, 0], c.sel_blocks, c.sel_init_blocks, c.sel_local_blocks, c.sel_block)
            seen = tokens_of_blocks(block_idx, b, c.sel_block) & (position[:b] <= t)
            o_slc, _ = attend(q[:, a:b], k_slc[:, :b], v_slc[:, :b], seen[:, :, None])
            z = max(0, a - c.window + 1)  # no query of the chunk looks further back
            near = (position[z:b] <= t) & (position[z:b] > t - c.window)
            o_win, _ = attend(q[:, a:b], k_win[:, z:b], v_win[:, z:b], near)
            g = gate[:, a:b]
            outputs.append(g[..., 0:1] * o_cmp + g[..., 1:2] * o_slc + g[..., 2:3] * o_win)  # eq. 5
            importances.append(importance.transpose(1, 2))
            block_idxs.append(block_idx.transpose(1, 2))
        note.update(gates=gate.detach(), importance=torch.cat(importances, 1), block_idx=torch.cat(block_idxs, 1))
        return self.o_proj(torch.cat(outputs, 1).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, config, width):
        super().__init__()
        C = config.hidden_size
        self.gate_proj, self.up_proj = nn.Linear(C, width, bias=False), nn.Linear(C, width, bias=False)
        self.down_proj = nn.Linear(width, C, bias=False)
        self.down_proj.init_scale = 1 / math.sqrt(2 * config.num_hidden_layers)

    def forward(self, x, note=None):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def route(probability, k, capacity):
    # probability (N,E) -> the k experts of each token (N,k), their weights, and which choices are kept.
    # capacity: the most tokens an expert takes, or None. Of equals the lower expert, the lower token.
    value, index = probability.sort(dim=-1, descending=True, stable=True)
    value, index = value[:, :k], index[:, :k]
    weight = value / value.sum(-1, keepdim=True) if k > 1 else value  # k = 1 keeps the router's gradient
    keep = torch.ones_like(index, dtype=torch.bool)
    if capacity is not None:
        for e in range(probability.shape[1]):
            token, slot = (index == e).nonzero(as_tuple=True)
            over = value[token, slot].sort(descending=True, stable=True).indices[capacity:]
            keep[token[over], slot[over]] = False
    return index, weight, keep


class MoE(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(SwiGLU(config, config.moe_intermediate_size) for _ in range(config.num_experts))
        if config.num_shared_experts:
            self.shared_experts = SwiGLU(config, config.num_shared_experts * config.moe_intermediate_size)

    def forward(self, x, note):
        c, E, k = self.config, self.config.num_experts, self.config.num_experts_per_tok
        shape, x = x.shape, x.flatten(0, -2)  # the N tokens of the micro-batch
        N = len(x)
        router = up(self.gate(x))
        p = router.softmax(-1)
        # dropping looks at later tokens, so only training does it
        capacity = math.ceil(c.capacity_factor * N * k / E) if self.training and c.capacity_factor > 0 else None
        index, weight, keep = route(p, k, capacity)
        y = self.shared_experts(x) if c.num_shared_experts else torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = ((index == e) & keep).nonzero(as_tuple=True)
            y = y.index_add(0, token, expert(x[token]) * weight[token, slot, None].to(x.dtype))
        share = F.one_hot(index, E).sum((0, 1)).to(p.dtype) / (N * k)  # of the choices before drops: no gradient
        note.update(moe_z=c.z_loss_coef * router.logsumexp(-1).pow(2).mean(),
                    moe_balance=c.balance_loss_coef * E * (share * p.mean(0)).sum(),
                    router=p.detach(), capacity=capacity, choice=index, keep=keep)
        return y.view(shape)


class Layer(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config) if config.layer_is_moe(layer) else SwiGLU(config, config.intermediate_size)

    def forward(self, x, note):
        x = x + self.self_attn(self.input_layernorm(x), note)
        return x + self.mlp(self.post_attention_layernorm(x), note)


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, trace=None):
        # x (B,T,C) embeddings -> normalised states (B,T,C), sum of the MoE terms.
        # A list given as trace receives what each layer notes down (chosen blocks, gates, routing).
        z, balance = x.new_zeros(()), x.new_zeros(())
        for layer in self.layers:
            note = {}
            x = layer(x, note)
            z, balance = z + note.get("moe_z", 0), balance + note.get("moe_balance", 0)
            if trace is not None:
                trace.append(note)
        return self.norm(x), z, balance


# ---------------------------------------------------------------------------------------------------------
# The transformers model

class NSAForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = NSAConfig
    base_model_prefix = "model"
    accepts_loss_kwargs = False  # for Trainer: the loss is a plain mean

    def __init__(self, config):
        super().__init__(config)
        self.model = Decoder(config)
        if not config.tie_word_embeddings:  # a tied head is the embedding itself, not a second tensor
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        self.generation_config.use_cache = False

    def _init_weights(self, module):
        # weights and pos normal(0, 0.02), smaller where a residual is added; norms 1; biases 0, but the gates'
        for name, p in module.named_parameters(recurse=False):
            if getattr(p, "_is_hf_initialized", False):
                continue
            if isinstance(module, RMSNorm):
                nn.init.ones_(p)
            elif name == "bias":
                nn.init.zeros_(p)
                if hasattr(module, "init_bias"):
                    with torch.no_grad():
                        p.view(-1, 3).add_(torch.tensor(module.init_bias, dtype=p.dtype, device=p.device))
            else:
                nn.init.normal_(p, 0.0, 0.02 * getattr(module, "init_scale", 1.0))

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return getattr(self, "lm_head", None)

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None, return_dict=None,
                logits_to_keep=0, trace=None, past_key_values=None, use_cache=None, position_ids=None,
                cache_position=None, output_attentions=None, output_hidden_states=None):
        # input_ids (B,T) -> logits (B,T,V), or of the last logits_to_keep positions. With labels (B,T), which are
        # shifted here and skipped where -100, also the loss: mean cross entropy, in training plus the MoE terms.
        # The arguments after trace are accepted for the callers' sake: there is no cache, and positions count
        # the tokens that attention_mask does not hide.
        x = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        head = self.lm_head.weight if hasattr(self, "lm_head") else self.model.embed_tokens.weight
        padded = attention_mask is not None and not bool(attention_mask.bool().all())
        if padded:
            # NSA's blocks are counted from a text's first token, so each row runs by itself, without its padding
            if self.training and self.config.num_experts:
                raise ValueError("MoE terms and capacities count every token: train on batches without padding")
            states = torch.zeros_like(x)
            for row, mask in enumerate(attention_mask.bool()):
                states[row, mask] = self.model(x[row:row + 1, mask])[0][0]
        else:
            states, z, balance = self.model(x, trace)
        logits = F.linear(states[:, -logits_to_keep:] if labels is None else states, head)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(up(logits[:, :-1]).flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
            if self.training and self.config.num_experts:
                loss = loss + z + balance
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        if attention_mask is not None and not bool(attention_mask[:, -1].all()):
            raise ValueError("generation continues the last token of each row: pad on the left")
        return {"input_ids": input_ids, "attention_mask": attention_mask, "logits_to_keep": 1}
