// Step 08: tensor cores. One mma.sync of a warp multiplies 16 x 16 by 16 x 8 elements of bf16 or f16: 64 of step 07's
// FMA instructions. Block, ring and both pipelines stay; new is how operands get to the registers where mma.sync wants
// them: by ldmatrix, four 8 x 8 matrices at a time, each row 16 bytes in one piece.
//
// Tiles lie in shared memory as in global memory, so copies are 16 bytes wide in every layout, and ldmatrix transposes.
// Its eight rows must fall on different banks: an XOR with the row's number permutes the 16-byte chunks of a row.
// Limit: for k = 16 a warp issues 8 ldmatrix and 32 mma.sync, which saturates the tensor cores of Ampere and Ada. Those
// of a Hopper take operands faster than registers can bring them: step 09. Refuses: f32. Takes every size and alignment
// (the fallback of the steps that follow): rows that do not start at a multiple of 16 bytes are copied by elements.
#include <algorithm>

#include "matmul/launch.cuh"
#include "simt/ptx.cuh"

namespace matmul {
namespace {

constexpr int tile_k = 32, stages = 3, warps_across = 2, warps = warps_across * warps_across, threads = 32 * warps;
constexpr int chunk = 8;  // elements in 16 bytes

template <class T, int tile>
struct alignas(128) Ring {
  T a[stages][tile * tile_k];
  T b[stages][tile * tile_k];
};
template <int tile>
struct alignas(128) Patches {
  float of_warp[warps][32][tile / warps_across + 8];  // 8 more: eight rows of pairs then lie in different banks
};

// Where the chunk that holds (line, k) lies in a tile. Any eight rows that ldmatrix reads at once, at the same place of
// eight neighbouring rows, get eight different places of 128 bytes: all 32 banks. Rows of 64 bytes make them in pairs.
template <int tile, bool along_k>
__device__ __forceinline__ int place(int line, int k) {
  if (along_k) return line * tile_k + (k / chunk ^ line / 2 % 4) * chunk;
  return k * tile + (line / chunk ^ k % 8) * chunk;
}

template <int tile, class T, bool along_k>
using Copy = SliceCopy<tile, tile_k, threads, chunk, T, along_k>;

// An operand that cp.async cannot copy by 16 bytes is copied by elements. Its tiles may then lie along k in shared
// memory whatever the matrix does: one kernel serves all layouts.
template <class T>
struct Elements {
  const T* data;
  int64_t line_step, k_step, batch_stride;
  int lines, depth;

  template <bool along_k>
  static Elements of(const Operand<T, along_k>& operand) {
    return {operand.data, along_k ? operand.leading : 1, along_k ? 1 : operand.leading, operand.batch_stride,
            operand.lines, operand.depth};
  }
};

// As SliceCopy, but the thread waits for what it loads. Neighbouring threads read neighbouring addresses.
template <int tile, class T>
struct ElementCopy {
  const Elements<T>& operand;
  int first_line, first_k;

  __device__ __forceinline__ ElementCopy(const Elements<T>& operand, int first_line)
      : operand(operand), first_line(first_line), first_k(0) {}

  template <class To>
  __device__ __forceinline__ void start(To to) {
    const T* const corner = operand.data + blockIdx.z * operand.batch_stride + first_line * operand.line_step +
                            first_k * operand.k_step;
    const int lines = operand.lines - first_line, depth = operand.depth - first_k;
    const bool as_stored = operand.k_step == 1;
#pragma unroll 8
    for (int done = 0; done < tile * tile_k; done += threads) {
      const int i = done + threadIdx.x;
      const int line = as_stored ? i / tile_k : i % tile, k = as_stored ? i % tile_k : i / tile;
      const bool inside = line < lines && k < depth;
      to(line, k)[k % chunk] = inside ? corner[line * operand.line_step + k * operand.k_step] : T(0.f);
    }
    first_k += tile_k;
  }
};

// 16 lines x 16 k of an operand, as mma.sync wants them. Of the four 8 x 8 matrices, A counts along lines first and B
// along k first: registers 0-3 are A's fragment, or 0-1 and 2-3 the fragments of B for 8 columns each.
template <int tile, bool is_a, class T, bool along_k>
__device__ __forceinline__ void load_fragment(uint32_t (&fragment)[4], const T* from, int line, int k) {
  const int matrix = threadIdx.x % 32 / 8, row = threadIdx.x % 8;
  const int line_half = is_a ? matrix % 2 : matrix / 2, k_half = is_a ? matrix / 2 : matrix % 2;
  line += 8 * line_half + (along_k ? row : 0);
  k += 8 * k_half + (along_k ? 0 : row);
  ptx::ldmatrix_x4<!along_k>(fragment, from + place<tile, along_k>(line, k));
}

template <bool whole_chunks, class T, bool along_k>
using Source = std::conditional_t<whole_chunks, Operand<T, along_k>, Elements<T>>;
template <bool whole_chunks, int tile, class T, bool along_k>
using CopyOf = std::conditional_t<whole_chunks, Copy<tile, T, along_k>, ElementCopy<tile, T>>;

// along_k here: how the tiles lie in shared memory.
template <int tile, bool whole_chunks, class In, bool a_along_k, bool b_along_k>
__global__ void __launch_bounds__(threads, 2)
    mma_sync(Source<whole_chunks, In, a_along_k> a, Source<whole_chunks, In, b_along_k> b, EitherEpilogue<In> epilogue) {
  constexpr int warp_side = tile / warps_across, down = warp_side / 16, across = warp_side / 16;
  auto& shared = simt::dynamic_shared<Ring<In, tile>>();
  const Tile corner = tile_of_block<tile, tile, 8>(epilogue.same.m, epilogue.same.n);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = warp / warps_across * warp_side, column = warp % warps_across * warp_side;

  CopyOf<whole_chunks, tile, In, a_along_k> a_copy(a, corner.row);
  CopyOf<whole_chunks, tile, In, b_along_k> b_copy(b, corner.column);
  const auto copy = [&](int stage) {
    In *const a_to = shared.a[stage], *const b_to = shared.b[stage];
    a_copy.start([&](int line, int k) { return a_to + place<tile, a_along_k>(line, k); });
    b_copy.start([&](int line, int k) { return b_to + place<tile, b_along_k>(line, k); });
    ptx::cp_async_commit_group();
  };
  uint32_t a_part[2][down][4], b_part[2][across][4];
  const auto load = [&](int buffer, int stage, int k) {
#pragma unroll
    for (int i = 0; i < down; ++i)
      load_fragment<tile, true, In, a_along_k>(a_part[buffer][i], shared.a[stage], row + 16 * i, k);
#pragma unroll
    for (int j = 0; j < across; ++j)
      load_fragment<tile, false, In, b_along_k>(b_part[buffer][j], shared.b[stage], column + 16 * j, k);
  };

  for (int stage = 0; stage < stages - 1; ++stage) copy(stage);
  ptx::cp_async_wait_group<stages - 2>();
  __syncthreads();
  load(0, 0, 0);

  float sum[down][2 * across][4] = {};
  const int slices = ceil_div(a.depth, tile_k);
  int stage = 0, free_stage = stages - 1;
  for (int slice = 0; slice < slices; ++slice) {
#pragma unroll
    for (int k = 0; k < tile_k; k += 16) {
      const int buffer = k / 16 % 2;
      if (k == tile_k - 16) {  // this slice is in registers: go on to the next, which has to have landed
        ptx::cp_async_wait_group<stages - 2>();
        __syncthreads();
        free_stage = stage;
        stage = stage + 1 < stages ? stage + 1 : 0;
      }
      load(1 - buffer, stage, (k + 16) % tile_k);
      if (k == 0) copy(free_stage);  // past the barrier: nobody reads the slice before this one
#pragma unroll
      for (int i = 0; i < down; ++i)
#pragma unroll
        for (int j = 0; j < 2 * across; ++j) {
          const uint32_t(&pair)[4] = b_part[buffer][j / 2];
          const uint32_t b_fragment[2] = {pair[j % 2 * 2], pair[j % 2 * 2 + 1]};
          ptx::mma_m16n8k16<In>(sum[i][j], a_part[buffer][i], b_fragment, sum[i][j]);
        }
    }
  }
  ptx::cp_async_wait_group<0>();  // zeros past the end may still be on their way to shared memory
  __syncthreads();

  // mma.sync leaves each thread pairs of columns, of rows lane / 4 and lane / 4 + 8.
  auto& patch = simt::dynamic_shared<Patches<tile>>().of_warp[warp];
#pragma unroll
  for (int half = 0; half < warp_side / 32; ++half) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 2 * across; ++j)
#pragma unroll
        for (int r = 0; r < 4; r += 2)
          *reinterpret_cast<float2*>(&patch[16 * i + lane / 4 + 4 * r][8 * j + lane % 4 * 2]) =
              make_float2(sum[2 * half + i][j][r], sum[2 * half + i][j][r + 1]);
    __syncwarp();
    epilogue.visit([&](const auto& to) {
      store_patch<32, warp_side, warp_side + 8>(to, patch[0], corner.row + row + 32 * half, corner.column + column);
    });
    __syncwarp();
  }
}

template <int tile, bool whole_chunks, bool a_along_k, bool b_along_k, class In>
void start(const Source<whole_chunks, In, a_along_k>& a, const Source<whole_chunks, In, b_along_k>& b,
           const EitherEpilogue<In>& epilogue, const Problem& part) {
  constexpr size_t shared_bytes = std::max(sizeof(Ring<In, tile>), sizeof(Patches<tile>));
  simt::launch(mma_sync<tile, whole_chunks, In, a_along_k, b_along_k>,
               grid_of_tiles(part, tile, tile, threads, shared_bytes), a, b, epilogue);
}

template <class In>
void choose(const Problem& problem) {
  for_layout<In, EitherEpilogue<In>>(problem, [](auto a, auto b, auto epilogue, const Problem& part) {
    const bool whole_chunks = a.aligned && b.aligned && Copy<128, In, a.along_k>::reaches(a) &&
                              Copy<128, In, b.along_k>::reaches(b);
    if (!whole_chunks) start<64, false, true, true>(Elements<In>::of(a), Elements<In>::of(b), epilogue, part);
    else if (enough_tiles(part, 128)) start<128, true, a.along_k, b.along_k>(a, b, epilogue, part);
    else start<64, true, a.along_k, b.along_k>(a, b, epilogue, part);
  });
}

}  // namespace

void mma_sync_08(const Problem& problem) {
  require_16_bit(problem, "mma_sync_08");
  require_pairs_for_swiglu(problem, "mma_sync_08");
  problem.in == DataType::bf16 ? choose<__nv_bfloat16>(problem) : choose<__half>(problem);
}

}  // namespace matmul
