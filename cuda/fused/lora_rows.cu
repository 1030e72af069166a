// lora_bgmv: an adapter for each row, as in decoding. Products of vectors: all time goes into reading A and B, once.
//
// Shrink: a block has 512 columns (1 KB) of one row and 16 ranks; each of its warps reads 4 lines of A, 8 loads of 16
// bytes a lane that are all on their way at once. Its part of x A^T, 4 bytes for 1 KB of A, goes to memory as float32.
// Expand: 16 KB of B for a block, a *team* of lanes for each column of y, 16 bytes of its ranks a lane; the parts are
// added up in one order. No sum depends on who comes first or on other rows: a row always has the same bits.
// Neighbouring blocks are neighbouring rows: those of one adapter find it in L2. The checks are in lora.cuh.
#include "fused/lora.cuh"

namespace fused {
namespace lora {
namespace {

constexpr int threads = 128, warp_ranks = 4, block_ranks = warp_ranks * threads / 32;
constexpr int chunks = 2;   // of each line of A, a lane of the shrink
constexpr int columns = 8;  // of y, a team of the expand
template <class T>
constexpr int share = chunks * 32 * per_chunk<T>;  // columns of x that a block has

// Four sums over the warp, in 6 shuffles: at each of the first two steps, lanes keep half of them. Lane 8 r has sum r.
PTX_INLINE float sum_of_four(const float (&x)[warp_ranks]) {
  const int lane = threadIdx.x % 32;
  const bool high = lane & 16, odd = lane & 8;
  float two[2];
#pragma unroll
  for (int i = 0; i < 2; ++i)
    two[i] = (high ? x[i + 2] : x[i]) + __shfl_xor_sync(0xffffffff, high ? x[i] : x[i + 2], 16);
  float sum = (odd ? two[1] : two[0]) + __shfl_xor_sync(0xffffffff, odd ? two[0] : two[1], 8);
#pragma unroll
  for (int bit = 4; bit > 0; bit /= 2) sum += __shfl_xor_sync(0xffffffff, sum, bit);
  return sum;
}

template <class T>
struct Slice {
  uint4 x[chunks * 32];
};

// between[blockIdx.y] of row blockIdx.x, ranks from 16 blockIdx.z on.
// The block reads its part of x once. Products come after the barrier and loads of A before it: were x loaded by each
// warp, the compiler would take turns with both, which saves registers and leaves two loads on their way.
template <class T, bool wide>
__global__ void __launch_bounds__(threads)
    shrink_row(Matrix<const T> x, Pool<T> a, Adapters adapters, Between between, int width) {
  constexpr int n = per_chunk<T>;
  const int row = blockIdx.x, lane = threadIdx.x % 32, first = blockIdx.z * block_ranks + threadIdx.x / 32 * warp_ranks;
  const int adapter = adapters.indices[row], begin = blockIdx.y * share<T>;
  if (adapter < 0) return;
  const int rank = adapters.rank(adapter);
  if (int(blockIdx.z) * block_ranks >= rank) return;
  auto& shared = simt::dynamic_shared<Slice<T>>();

  uint4 weight[warp_ranks][chunks];
#pragma unroll
  for (int r = 0; r < warp_ranks; ++r)
#pragma unroll
    for (int c = 0; c < chunks; ++c) {
      const int column = begin + (c * 32 + lane) * n, left = first + r < rank ? width - column : 0;
      weight[r][c] = load_chunk<wide>(a.at(adapter, first + r, column), a.column, left);
    }
  if (threadIdx.x < chunks * 32) {
    const int column = begin + threadIdx.x * n;
    shared.x[threadIdx.x] = load_chunk<wide>(x.at(row, column), x.column, width - column);
  }
  __syncthreads();
  float sum[warp_ranks] = {};
#pragma unroll
  for (int c = 0; c < chunks; ++c) {
    float left[n];
    unpack<T, n>(shared.x[c * 32 + lane], left);
#pragma unroll
    for (int r = 0; r < warp_ranks; ++r) {
      float right[n];
      unpack<T, n>(weight[r][c], right);
#pragma unroll
      for (int i = 0; i < n; ++i) sum[r] += left[i] * right[i];
    }
  }
  const float mine = sum_of_four(sum);
  const int r = first + lane / 8;
  if (lane % 8 == 0 && r < rank) *between.at(blockIdx.y, row, r) = mine;
}

struct Results {
  float left[most_ranks], of_column[threads * columns];
};

// blockIdx.y: which columns of row blockIdx.x. A team of 1 to 32 lanes, a power of two, covers the ranks of a column;
// more than 32 chunks of them take turns. The block adds up the parts of x A^T while the first of B is on its way.
template <class T, bool wide>
__global__ void __launch_bounds__(threads)
    expand_row(Between between, Pool<T> b, Adapters adapters, Matrix<T> y, int width, int team, bool add) {
  constexpr int n = per_chunk<T>;
  const int row = blockIdx.x, teams = threads / team, first = blockIdx.y * teams * columns;
  const int many = min(teams * columns, width - first), mine = threadIdx.x / team;
  const int adapter = adapters.indices[row], rank = adapter < 0 ? 0 : adapters.rank(adapter);
  if (rank == 0 && add) return;
  auto& shared = simt::dynamic_shared<Results>();

  float sum[columns] = {};
#pragma unroll 1
  for (int begin = 0; begin < rank; begin += team * n) {
    const int r = begin + threadIdx.x % team * n;
    uint4 weight[columns];
#pragma unroll
    for (int j = 0; j < columns; ++j) {
      const int column = first + j * teams + mine;
      weight[j] = load_chunk<wide>(b.at(adapter, r, column), b.rank, column < width ? rank - r : 0);
    }
    if (begin == 0) {
#pragma unroll 1
      for (int i = threadIdx.x; i < most_ranks; i += threads) {
        float x = 0.f;
        if (i < rank)
#pragma unroll 8
          for (int part = 0; part < between.parts; ++part) x += *between.at(part, row, i);
        shared.left[i] = x;
      }
      __syncthreads();
    }
    float left[n];
#pragma unroll
    for (int i = 0; i < n; i += 4) {
      const float4 x = r < most_ranks ? *reinterpret_cast<const float4*>(shared.left + r + i) : make_float4(0, 0, 0, 0);
      left[i] = x.x, left[i + 1] = x.y, left[i + 2] = x.z, left[i + 3] = x.w;
    }
#pragma unroll
    for (int j = 0; j < columns; ++j) {
      float right[n];
      unpack<T, n>(weight[j], right);
#pragma unroll
      for (int i = 0; i < n; ++i) sum[j] += left[i] * (r + i < rank ? right[i] : 0.f);  // past the rank may be a NaN
    }
  }
#pragma unroll
  for (int j = 0; j < columns; ++j) {
#pragma unroll 1
    for (int bit = team / 2; bit > 0; bit /= 2) sum[j] += __shfl_xor_sync(0xffffffff, sum[j], bit);
    if (threadIdx.x % team == 0) shared.of_column[j * teams + mine] = sum[j];
  }
  __syncthreads();
  const float scale = rank ? adapters.scales[adapter] : 0.f;
#pragma unroll 1
  for (int i = threadIdx.x * n; i < many; i += threads * n)
    store_run(y, row, first + i, width, shared.of_column + i, scale, add);
}

template <class T>
void launch(const Given& p, const View& y, bool add, void* stream) {
  const Between between = p.parts();
  const int64_t parts = divide_up(p.width, share<T>);
  if (between.parts != parts)
    p.between.refuse("shape " + p.between.shape() + ": expected " + std::to_string(parts) + " parts");
  const Matrix<const T> x = matrix_of<const T>(p.x);
  const Pool<T> a = pool_of<T>(p.a, false, true), b = pool_of<T>(p.b, true, true);
  int team = 1;
  while (team < 32 && team * per_chunk<T> < p.most) team *= 2;
  const int64_t blocks = divide_up(p.out, threads / team * columns);
  if (blocks > 65535) y.refuse("shape " + y.shape() + ": expected less columns");
  simt::Launch shape{dim3(p.rows, between.parts, unsigned(divide_up(p.most, block_ranks))), dim3(threads),
                     sizeof(Slice<T>)};
  shape.stream = stream;
  simt::launch(x.wide && a.wide ? shrink_row<T, true> : shrink_row<T, false>, shape, x, a, p.adapters, between,
               p.width);
  shape.grid = dim3(p.rows, unsigned(blocks));
  shape.shared_bytes = sizeof(Results);
  simt::launch(b.wide ? expand_row<T, true> : expand_row<T, false>, shape, between, b, p.adapters, matrix_of<T>(y),
               p.out, team, add);
}

void run(const Arguments& given) {
  const View& x = given.array("x");
  const Given p(given, x.size[0], x, given.array("a_pool"), turned(given.array("b_pool")), "workspace");
  const View& y = p.check(given.array("y"));
  with_type(x.type, [&](auto type) { launch<decltype(type)>(p, y, given.flag("add"), given.stream); });
}

const native::Operation registered("lora_bgmv", run);

}  // namespace
}  // namespace lora
}  // namespace fused
