// The operations attention_forward and attention_backward: arrays by name become a Problem, and a step of a ladder runs it.
// Layouts are read off the strides. Everything a kernel relies on is checked here, but for what lies in starts_q and
// starts_k, which may be on a GPU: cuda/attention_ops.py looks at those, allocates the results and picks the step.
#include <algorithm>
#include <cmath>

#include "attention/attention.h"
#include "native/operation.h"

namespace attention {

// Weak: a step whose source is not in this module is null here.
namespace forward {
[[gnu::weak]] void naive_01(const Problem&, float*);
[[gnu::weak]] void online_02(const Problem&);
[[gnu::weak]] void mma_sync_03(const Problem&);
[[gnu::weak]] void wgmma_04(const Problem&);
[[gnu::weak]] void producer_05(const Problem&);
[[gnu::weak]] void ping_pong_06(const Problem&);
[[gnu::weak]] void overlap_07(const Problem&);
[[gnu::weak]] void persistent_08(const Problem&);
[[gnu::weak]] void best_09(const Problem&);
}  // namespace forward
namespace backward {
[[gnu::weak]] void recompute_01(const Backward&);
[[gnu::weak]] void mma_sync_02(const Backward&);
[[gnu::weak]] void wgmma_03(const Backward&);
[[gnu::weak]] void dq_reduce_04(const Backward&);
[[gnu::weak]] void best_05(const Backward&);
}  // namespace backward

namespace {

using native::Arguments, native::View;

struct Sizes {
  bool packed;
  int batch, heads, kv_heads, head_dim, queries, keys, total_queries, total_keys;
};

int count(const View& x, int dimension) {
  if (x.size[dimension] > (1 << 30)) x.refuse("shape " + x.shape() + ": expected at most 2^30 in each dimension");
  return int(x.size[dimension]);
}

// (B, heads, rows, K), or (rows, heads, K) where lengths vary; the K elements of a row are contiguous.
Tensor tensor_of(const View& x, const Sizes& s, bool of_queries, DataType type) {
  const int64_t heads = of_queries ? s.heads : s.kv_heads;
  if (s.packed) x.expect_shape({of_queries ? s.total_queries : s.total_keys, heads, s.head_dim});
  else x.expect_shape({s.batch, heads, of_queries ? s.queries : s.keys, s.head_dim});
  x.expect_type({type});
  if (x.stride[x.rank - 1] != 1)
    x.refuse("strides " + x.strides() + ": expected a contiguous last dimension; call .contiguous()");
  for (int i = 0; i + 1 < x.rank; ++i)  // 0 would do for threads, but TMA knows no such stride
    if (x.size[i] > 1 && (x.stride[i] % 8 || x.stride[i] <= 0))
      x.refuse("strides " + x.strides() + ": expected positive multiples of 8, which are 16 bytes; call .contiguous()");
  x.expect_aligned(16);
  const auto stride = [&](int i) { return x.size[i] > 1 ? x.stride[i] : 0; };
  if (s.packed) return {x.data, 0, stride(0), stride(1)};
  return {x.data, stride(0), stride(2), stride(1)};
}

const float* floats(const View& x) { return x.expect_type({DataType::f32}).as<float>(); }

Problem problem_of(const Arguments& given) {
  const View &q = given.array("q"), &k = given.array("k");
  const View* const starts_q = given.optional("starts_q");
  const View* const starts_k = given.optional("starts_k");
  q.expect_type({DataType::bf16, DataType::f16});
  if ((starts_q != nullptr) != (starts_k != nullptr))
    (starts_q ? starts_q : starts_k)->refuse("starts_q and starts_k: expected both or none");
  Sizes s = {};
  s.packed = starts_q != nullptr;
  q.expect_rank(s.packed ? 3 : 4);
  k.expect_rank(s.packed ? 3 : 4);
  s.heads = count(q, 1), s.kv_heads = count(k, 1), s.head_dim = count(q, q.rank - 1);
  Problem p = {};
  if (s.packed) {
    s.batch = count(*starts_q, 0) - 1;
    starts_q->expect_type({DataType::i32}).expect_shape({s.batch + 1}).expect_contiguous();
    starts_k->expect_type({DataType::i32}).expect_shape({s.batch + 1}).expect_contiguous();
    s.total_queries = count(q, 0), s.total_keys = count(k, 0);
    s.queries = given.integer("longest_q"), s.keys = given.integer("longest_k");  // of a sequence
    p.starts_q = starts_q->as<int32_t>(), p.starts_k = starts_k->as<int32_t>();
  } else {
    s.batch = count(q, 0), s.queries = count(q, 2), s.keys = count(k, 2);
    if (int64_t(s.batch) * std::max(s.queries, s.keys) > (1 << 30)) q.refuse("shape " + q.shape() + ": expected at most 2^30 rows");
    s.total_queries = s.batch * s.queries, s.total_keys = s.batch * s.keys;
  }
  if (s.kv_heads < 1 || s.heads % s.kv_heads)
    k.refuse(std::to_string(s.kv_heads) + " heads: expected a divisor of the " + std::to_string(s.heads) + " of q");
  p.batch = s.batch, p.heads = s.heads, p.kv_heads = s.kv_heads, p.head_dim = s.head_dim;
  p.queries = s.queries, p.keys = s.keys, p.total_queries = s.total_queries, p.total_keys = s.total_keys;
  if (int64_t(std::max(s.queries, s.keys) / 64 + 1) * s.heads * s.batch > 0x7fffffff)  // tiles, or blocks of a grid
    q.refuse("shape " + q.shape() + " with sequences of up to " + std::to_string(std::max(s.queries, s.keys)) +
             " rows: expected fewer, at most 2^31 tiles of 64 rows over all heads and sequences");
  p.type = q.type;
  p.q = tensor_of(q, s, true, q.type), p.k = tensor_of(k, s, false, q.type);
  p.v = tensor_of(given.array("v"), s, false, q.type), p.o = tensor_of(given.array("o"), s, true, q.type);
  const View& lse = given.array("lse").expect_type({DataType::f32}).expect_contiguous();
  if (s.packed) lse.expect_shape({s.heads, s.total_queries});
  else lse.expect_shape({s.batch, s.heads, s.queries});
  p.lse = lse.as<float>();
  p.lse_head = s.packed ? s.total_queries : s.queries;
  p.lse_batch = s.packed ? 0 : int64_t(s.heads) * s.queries;

  p.scale = float(given.number("scale")), p.softcap = float(given.number("softcap"));
  p.left = given.integer("left"), p.right = given.integer("right");
  if (!(p.scale > 0.f) || !std::isfinite(p.scale)) throw std::invalid_argument("scale: expected a positive finite number");
  if (!(p.softcap >= 0.f) || !std::isfinite(p.softcap)) throw std::invalid_argument("softcap: expected 0 or a positive number");
  if (p.left < 0 || p.right < 0 || p.left > everything || p.right > everything)
    throw std::invalid_argument("left, right: expected 0 to 2^30");
  if (const View* const sink = given.optional("sink"))
    p.sink = floats(sink->expect_shape({s.heads}).expect_contiguous());
  if (const View* const bias = given.optional("bias")) {
    if (s.packed) bias->refuse("beside starts_q: expected none, sequences of different length take no bias");
    bias->expect_rank(4);
    const bool fits = (bias->size[0] == 1 || bias->size[0] == s.batch) && (bias->size[1] == 1 || bias->size[1] == s.heads);
    if (!fits || bias->size[2] != s.queries || bias->size[3] != s.keys)
      bias->refuse("shape " + bias->shape() + ": expected (1 or " + std::to_string(s.batch) + ", 1 or " +
                   std::to_string(s.heads) + ", " + std::to_string(s.queries) + ", " + std::to_string(s.keys) + ")");
    if (s.keys > 1 && bias->stride[3] != 1) bias->refuse("strides " + bias->strides() + ": expected a contiguous last dimension");
    p.bias = floats(*bias);
    p.bias_batch = bias->size[0] > 1 ? bias->stride[0] : 0, p.bias_head = bias->size[1] > 1 ? bias->stride[1] : 0;
    p.bias_row = s.queries > 1 ? bias->stride[2] : 0;
  }
  p.stream = given.stream;
  return p;
}

bool nothing_to_do(const Problem& p) { return p.batch == 0 || p.total_queries == 0 || p.total_keys == 0 || p.queries == 0; }

struct Step {
  const char* name;
  void (*run)(const Problem&);
};

void run_forward(const Arguments& given) {
  using namespace forward;
  const std::string& name = given.word("step");
  for (const char* written : {"o", "lse"}) given.array(written).expect_writable();
  const Problem p = problem_of(given);
  if (nothing_to_do(p)) throw std::invalid_argument("q, k: expected queries and keys");
  if (name == "naive_01" && naive_01) {
    const View& scores = given.array("scores").expect_type({DataType::f32}).expect_contiguous();
    scores.expect_shape({p.batch, p.heads, p.queries, p.keys});
    return naive_01(p, scores.as<float>());
  }
  const Step ladder[] = {{"online_02", online_02},       {"mma_sync_03", mma_sync_03}, {"wgmma_04", wgmma_04},
                         {"producer_05", producer_05},   {"ping_pong_06", ping_pong_06}, {"overlap_07", overlap_07},
                         {"persistent_08", persistent_08}, {"best_09", best_09}};
  for (const Step& step : ladder)
    if (name == step.name && step.run) return step.run(p);
  throw std::invalid_argument("step '" + name + "': this module has no such forward step");
}

struct BackwardStep {
  const char* name;
  void (*run)(const Backward&);
};

void run_backward(const Arguments& given) {
  using namespace backward;
  const std::string& name = given.word("step");
  for (const char* written : {"dq", "dk", "dv", "delta", "dq_sum", "turns"}) given.array(written).expect_writable();
  Backward b = {};
  b.forward = problem_of(given);
  const Problem& p = b.forward;
  if (nothing_to_do(p)) throw std::invalid_argument("q, k: expected queries and keys");
  const Sizes s = {p.starts_q != nullptr, p.batch, p.heads, p.kv_heads, p.head_dim, p.queries, p.keys, p.total_queries, p.total_keys};
  b.d_o = tensor_of(given.array("d_o"), s, true, p.type), b.dq = tensor_of(given.array("dq"), s, true, p.type);
  b.dk = tensor_of(given.array("dk"), s, false, p.type), b.dv = tensor_of(given.array("dv"), s, false, p.type);
  const auto workspace = [&](const char* array, DataType type, int64_t elements) -> const View& {
    const View& x = given.array(array).expect_type({type}).expect_contiguous().expect_aligned(16);
    if (x.elements() < elements) x.refuse(std::to_string(x.elements()) + " elements: expected " + std::to_string(elements));
    return x;
  };
  b.delta = workspace("delta", DataType::f32, int64_t(p.heads) * p.total_queries).as<float>();
  b.dq_sum = workspace("dq_sum", DataType::f32, p.heads * (p.total_queries + int64_t(128) * p.batch) * p.head_dim).as<float>();
  b.turns = workspace("turns", DataType::i32, p.heads * (p.total_queries / 64 + int64_t(p.batch))).as<int32_t>();
  if (const View* const d_lse = given.optional("d_lse")) {
    const View& lse = given.array("lse");
    if (s.packed) d_lse->expect_shape({lse.size[0], lse.size[1]});
    else d_lse->expect_shape({lse.size[0], lse.size[1], lse.size[2]});
    b.d_lse = floats(d_lse->expect_contiguous());
  }
  b.deterministic = given.flag("deterministic");
  const BackwardStep ladder[] = {{"recompute_01", recompute_01}, {"mma_sync_02", mma_sync_02}, {"wgmma_03", wgmma_03},
                                 {"dq_reduce_04", dq_reduce_04}, {"best_05", best_05}};
  for (const BackwardStep& step : ladder)
    if (name == step.name && step.run) return step.run(b);
  throw std::invalid_argument("step '" + name + "': this module has no such backward step");
}

const native::Operation forward_operation("attention_forward", run_forward);
const native::Operation backward_operation("attention_backward", run_backward);

}  // namespace
}  // namespace attention
