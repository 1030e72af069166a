// The operation attention_decode: arrays by name become a Decode. Everything a kernel relies on is checked here, but
// for the values in block_table and lengths, which may be on a GPU: cuda/decode_ops.py looks at those.
#include <cmath>

#include "attention/decode.h"
#include "native/operation.h"

namespace attention {
namespace {

using native::Arguments, native::View;

int count(const View& x, int dimension, int most = 1 << 30) {
  if (x.size[dimension] < 1 || x.size[dimension] > most)
    x.refuse("shape " + x.shape() + ": expected 1 to " + std::to_string(most) + " in dimension " +
             std::to_string(dimension));
  return int(x.size[dimension]);
}

// Four dimensions, K contiguous, and rows that 16-byte copies can take. A dimension of 1 has stride 0.
struct Strides {
  int64_t of[3];
};
Strides strides_of(const View& x, DataType type) {
  x.expect_rank(4).expect_type({type}).expect_aligned(16);
  if (x.stride[3] != 1)
    x.refuse("strides " + x.strides() + ": expected a contiguous last dimension; call .contiguous()");
  Strides strides = {};
  for (int i = 0; i < 3; ++i) {
    if (x.size[i] <= 1) continue;
    if (x.stride[i] % 8 || x.stride[i] < 0)
      x.refuse("strides " + x.strides() + ": expected multiples of 8, which are 16 bytes; call .contiguous()");
    strides.of[i] = x.stride[i];
  }
  return strides;
}

Tensor tensor_of(const View& x, DataType type) {
  const Strides s = strides_of(x, type);
  return {x.data, s.of[0], s.of[2], s.of[1]};
}
Pages pages_of(const View& x, DataType type) {
  const Strides s = strides_of(x, type);
  return {x.data, s.of[0], s.of[1], s.of[2]};
}

float positive(const Arguments& given, const char* name, bool or_zero) {
  const float value = float(given.number(name));
  if (!std::isfinite(value) || value < 0.f || (value == 0.f && !or_zero))
    throw std::invalid_argument(std::string(name) + ": " + std::to_string(value) + ": expected a positive number" +
                                (or_zero ? " or 0" : ""));
  return value;
}

void read_splits(Decode& p, const Arguments& given) {
  p.splits = given.integer("splits"), p.least_keys = given.integer("least_keys");
  if (p.splits < 1 || p.splits > 65535) throw std::invalid_argument("splits: expected 1 to 65535");
  if (p.least_keys < 0 || p.least_keys > 4096) throw std::invalid_argument("least_keys: expected 0 to 4096");
  if (p.splits == 1) return;
  const auto workspace = [&](const char* name, int64_t width) {
    const View& x = given.array(name).expect_type({DataType::f32}).expect_contiguous().expect_aligned(16);
    const int64_t elements = int64_t(p.splits) * p.batch * p.heads * p.queries * width;
    if (x.elements() < elements)
      x.refuse(std::to_string(x.elements()) + " elements: expected " + std::to_string(elements));
    return x.as<float>();
  };
  p.split_o = workspace("split_o", p.head_dim), p.split_state = workspace("split_state", 2);
}

void run(const Arguments& given) {
  const View &q = given.array("q"), &k = given.array("k_cache"), &v = given.array("v_cache");
  q.expect_rank(4).expect_type({DataType::bf16, DataType::f16});
  k.expect_rank(4);
  Decode p = {};
  p.type = q.type;
  p.batch = count(q, 0, 65535), p.heads = count(q, 1), p.queries = count(q, 2, 65535), p.head_dim = count(q, 3);
  if (int64_t(p.batch) * p.heads * p.queries > (1 << 30))
    q.refuse("shape " + q.shape() + ": expected at most 2^30 rows");
  p.block_size = count(k, 1), p.kv_heads = count(k, 2, 65535);
  const int pages = count(k, 0);
  if (p.heads % p.kv_heads)
    k.refuse(std::to_string(p.kv_heads) + " heads: expected a divisor of the " + std::to_string(p.heads) + " of q");
  if (p.block_size % 16) k.refuse("blocks of " + std::to_string(p.block_size) + " keys: expected a multiple of 16");
  k.expect_shape({pages, p.block_size, p.kv_heads, p.head_dim});
  v.expect_shape({pages, p.block_size, p.kv_heads, p.head_dim});
  const View& o = given.array("o").expect_shape({p.batch, p.heads, p.queries, p.head_dim}).expect_writable();
  p.q = tensor_of(q, q.type), p.o = tensor_of(o, q.type), p.k = pages_of(k, q.type), p.v = pages_of(v, q.type);

  const View& table = given.array("block_table").expect_type({DataType::i32}).expect_rank(2);
  table.expect_shape({p.batch, table.size[1]});
  if (table.size[1] > 1 && table.stride[1] != 1)
    table.refuse("strides " + table.strides() + ": expected a contiguous last dimension; call .contiguous()");
  p.table = table.as<int32_t>(), p.table_row = p.batch > 1 ? table.stride[0] : 0;
  const View& lengths = given.array("lengths").expect_type({DataType::i32}).expect_shape({p.batch});
  p.lengths = lengths.expect_contiguous().as<int32_t>();
  const View& lse = given.array("lse").expect_type({DataType::f32}).expect_shape({p.batch, p.heads, p.queries});
  p.lse = lse.expect_contiguous().expect_writable().as<float>();
  if (const View* const sink = given.optional("sink"))
    p.sink = sink->expect_type({DataType::f32}).expect_shape({p.heads}).expect_contiguous().as<float>();

  p.scale = positive(given, "scale", false), p.softcap = positive(given, "softcap", true);
  p.left = given.integer("left");
  if (p.left < 0 || p.left > everything) throw std::invalid_argument("left: expected 0 to 2^30");
  read_splits(p, given);
  p.stream = given.stream;
  decoding::split_kv(p);
}

const native::Operation registered("attention_decode", run);

}  // namespace
}  // namespace attention
