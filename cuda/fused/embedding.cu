// Rows of a table by their numbers, and the gradient of the table: for each number the sum of the gradients of the rows
// that were taken, in float32 and always in the same order.
//
// Atomic additions would be simpler and would add in another order every time. Here the tokens come sorted, with the
// places where they stood, and equal tokens are neighbours: a segment. Frequent tokens have thousands of rows, so a
// block for each segment would leave all but a few blocks waiting. Instead each block sums a piece of the sorted list,
// of fixed length; a segment of several pieces leaves float32 partial sums there, which a second kernel adds up.
//
// Bytes, for N tokens of C elements of E bytes: forward reads and writes N C E. The gradient reads N C E and writes
// each row of the table that was taken; partial sums are at most 2 rows of float32 a piece. The caller has set the
// gradient to zero: rows that nobody took are not written. A token outside of the table gives a row of NaN, and no
// gradient.
#include "fused/training.cuh"
#include "native/operation.h"

namespace fused {
namespace {

using namespace training;
using native::Arguments, native::DataType, native::View;

constexpr int piece_length = 64;  // tokens of a block: a frequent token's partial sums are a 64th of its rows
constexpr int threads_of_copy = 256, threads_of_sum = 128;
constexpr int at_once = 4;  // rows whose loads are started before the first is added

// ---- forward --------------------------------------------------------------------------------------------------------

// A warp copies a row, one unit a lane, and then the next: 16 bytes where every row starts at a multiple of that, else
// one element. `__restrict__` lets loads go before the stores of the row so far.
template <class Unit>
__global__ void __launch_bounds__(threads_of_copy)
    look_up(const Unit* __restrict__ table, const int64_t* __restrict__ tokens, Unit* __restrict__ rows, int64_t count,
            int64_t entries, int units, Unit nan) {
  const int lane = threadIdx.x % 32;
  const int64_t warps = int64_t(gridDim.x) * (blockDim.x / 32);
#pragma unroll 1
  for (int64_t i = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32; i < count; i += warps) {
    const int64_t token = tokens[i];
    Unit* const to = rows + i * units;
    if (token < 0 || token >= entries) {
#pragma unroll 1
      for (int unit = lane; unit < units; unit += 32) to[unit] = nan;
      continue;
    }
    const Unit* const from = table + token * units;
#pragma unroll 4
    for (int unit = lane; unit < units; unit += 32) to[unit] = from[unit];
  }
}

// ---- backward -------------------------------------------------------------------------------------------------------

struct Segments {
  const int32_t* tokens;  // in ascending order
  const int64_t* places;  // of each in the text
  int count, entries, columns;
  float* partial;  // [piece][first or last of its segments][column]

  PTX_INLINE int first(int piece) const { return piece * piece_length; }
  PTX_INLINE int last(int piece) const { return min(count, (piece + 1) * piece_length) - 1; }
  // Whether a segment reaches over the end of the piece.
  PTX_INLINE bool goes_on(int piece) const {
    return last(piece) + 1 < count && tokens[last(piece)] == tokens[last(piece) + 1];
  }
  PTX_INLINE bool inside(int token) const { return token >= 0 && token < entries; }
  PTX_INLINE float* partial_sum(int piece, bool of_last, int column) const {
    return partial + (int64_t(piece) * 2 + of_last) * columns + column;
  }
};

// A thread's elements of a row: 16 bytes of them, or one.
template <class T, int n>
struct Elements {
  float x[n];

  PTX_INLINE void clear() {
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = 0.f;
  }
  template <class Other>
  PTX_INLINE void load(const Other* from) {
    if constexpr (n == 1) x[0] = float(*from);
    else unpack<T>(*reinterpret_cast<const uint4*>(from), x);
  }
  PTX_INLINE void store(T* to) const {
    if constexpr (n == 1) *to = T(x[0]);
    else *reinterpret_cast<uint4*>(to) = pack<T>(x);
  }
  PTX_INLINE void add(const Elements& other) {
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] += other.x[i];
  }
  PTX_INLINE void add_floats(const float* from) {
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] += from[i];
  }
  PTX_INLINE void store_floats(float* to) const {
#pragma unroll
    for (int i = 0; i < n; ++i) to[i] = x[i];
  }
};

// blockIdx.x is the piece; blockIdx.y and the thread say which columns.
template <class T, int n>
__global__ void __launch_bounds__(threads_of_sum) sum_pieces(Segments s, const T* rows, T* gradient) {
  const int piece = blockIdx.x, column = (blockIdx.y * threads_of_sum + threadIdx.x) * n;
  if (column >= s.columns) return;
  const int first = s.first(piece), last = s.last(piece);
  const bool from_before = piece > 0 && s.goes_on(piece - 1), goes_on = s.goes_on(piece);
  bool open_start = from_before;  // the segment began in an earlier piece
  Elements<T, n> sum;
  sum.clear();
#pragma unroll 1
  for (int begin = first; begin <= last; begin += at_once) {
    Elements<T, n> row[at_once];
#pragma unroll
    for (int j = 0; j < at_once; ++j)
      if (begin + j <= last) row[j].load(rows + s.places[begin + j] * s.columns + column);
#pragma unroll
    for (int j = 0; j < at_once; ++j) {
      const int i = begin + j;
      if (i > last) break;
      sum.add(row[j]);
      const int token = s.tokens[i];
      if (i < last && s.tokens[i + 1] == token) continue;
      if (open_start) sum.store_floats(s.partial_sum(piece, false, column));
      else if (i == last && goes_on) sum.store_floats(s.partial_sum(piece, true, column));
      else if (s.inside(token)) sum.store(gradient + int64_t(token) * s.columns + column);
      sum.clear();
      open_start = false;
    }
  }
}

// A block has the segment that begins in its piece and reaches over its end, if there is one.
template <class T, int n>
__global__ void __launch_bounds__(threads_of_sum) add_partial(Segments s, T* gradient) {
  const int column = (blockIdx.y * threads_of_sum + threadIdx.x) * n;
  int piece = blockIdx.x;
  if (column >= s.columns || !s.goes_on(piece)) return;
  const int token = s.tokens[s.last(piece)];
  const bool begins_before = s.tokens[s.first(piece)] == token && piece > 0 && s.goes_on(piece - 1);
  if (begins_before || !s.inside(token)) return;
  Elements<T, n> sum;
  sum.clear();
  sum.add_floats(s.partial_sum(piece, true, column));
  bool more = true;
#pragma unroll 1
  while (more) {
    ++piece;
    sum.add_floats(s.partial_sum(piece, false, column));
    more = s.tokens[s.last(piece)] == token && s.goes_on(piece);
  }
  sum.store(gradient + int64_t(token) * s.columns + column);
}

// ---- the operations -------------------------------------------------------------------------------------------------

bool aligned(const View& x, int64_t row_bytes) {
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && row_bytes % 16 == 0;
}

const View& table_of(const Arguments& given, const char* name) {
  const View& table = given.array(name).expect_rank(2).expect_contiguous();
  table.expect_type({DataType::f32, DataType::bf16, DataType::f16});
  if (table.size[0] < 1 || table.size[0] > 0x7fffffff || table.size[1] < 1 || table.size[1] > (1 << 20))
    table.refuse("shape " + table.shape() + ": expected at least one row of 1 to 2^20 columns");
  return table;
}

const View& rows_of(const Arguments& given, const char* name, const View& table, int64_t count) {
  if (count < 1 || count > (1 << 30)) given.array(name).refuse("expected 1 to 2^30 tokens");
  return given.array(name).expect_type({table.type}).expect_shape({count, table.size[1]}).expect_contiguous();
}

void run_forward(const Arguments& given) {
  const View &table = table_of(given, "table"), &tokens = given.array("tokens");
  tokens.expect_type({DataType::i64}).expect_rank(1).expect_contiguous();
  const int64_t count = tokens.size[0], entries = table.size[0], bytes = table.size[1] * simt::size_of(table.type);
  const View& rows = rows_of(given, "rows", table, count).expect_writable();
  const int64_t warps = threads_of_copy / 32, blocks = (count + warps - 1) / warps;
  const int64_t most = simt::multiprocessors() * (64 / warps);  // as many as are at work at once
  const dim3 grid(unsigned(blocks < most ? blocks : most));
  const simt::Launch shape{grid, dim3(threads_of_copy), 0, 1, false, given.stream};
  const auto launch = [&](auto nan) {
    using Unit = decltype(nan);
    simt::launch(look_up<Unit>, shape, table.as<Unit>(), tokens.as<int64_t>(), rows.as<Unit>(), count, entries,
                 int(bytes / int64_t(sizeof(Unit))), nan);
  };
  const unsigned nan = table.type == DataType::f32 ? 0x7fffffffu : 0x7fff7fffu;
  if (aligned(table, bytes) && aligned(rows, bytes)) launch(make_uint4(nan, nan, nan, nan));
  else if (table.type == DataType::f32) launch(nan);
  else launch(uint16_t(nan));
}

template <class T, int n>
void launch_backward(const Segments& s, const View& rows, const View& gradient, void* stream) {
  const int pieces = (s.count + piece_length - 1) / piece_length, across = threads_of_sum * n;
  const simt::Launch shape{dim3(pieces, (s.columns + across - 1) / across), dim3(threads_of_sum), 0, 1, false, stream};
  simt::launch(sum_pieces<T, n>, shape, s, rows.as<const T>(), gradient.as<T>());
  if (pieces > 1) simt::launch(add_partial<T, n>, shape, s, gradient.as<T>());
}

void run_backward(const Arguments& given) {
  const View &gradient = table_of(given, "gradient").expect_writable(), &tokens = given.array("tokens");
  tokens.expect_type({DataType::i32}).expect_rank(1).expect_contiguous();
  const int64_t count = tokens.size[0], columns = gradient.size[1];
  const View& rows = rows_of(given, "rows", gradient, count);
  const View& places = given.array("places").expect_type({DataType::i64}).expect_shape({count}).expect_contiguous();
  const View& partial = given.array("partial").expect_type({DataType::f32}).expect_contiguous().expect_writable();
  partial.expect_shape({(count + piece_length - 1) / piece_length, 2, columns});
  const Segments s{tokens.as<int32_t>(),  places.as<int64_t>(), int(count),
                   int(gradient.size[0]), int(columns),         partial.as<float>()};
  const int64_t bytes = columns * simt::size_of(gradient.type);
  const bool wide = aligned(gradient, bytes) && aligned(rows, bytes);
  const auto launch = [&](auto type) {
    using T = decltype(type);
    (wide ? launch_backward<T, width<T>> : launch_backward<T, 1>)(s, rows, gradient, given.stream);
  };
  if (gradient.type == DataType::f32) launch(float{});
  else if (gradient.type == DataType::bf16) launch(__nv_bfloat16{});
  else launch(__half{});
}

const native::Operation forward_operation("embedding", run_forward);
const native::Operation backward_operation("embedding_backward", run_backward);

}  // namespace
}  // namespace fused
