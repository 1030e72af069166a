// Mistakes of attention: two warpgroups take turns at the tensor cores while a third one feeds them K and V; and of
// blocks that add to one sum in turn.
#include <algorithm>

#include "seeded.h"

namespace seeded {

// ---- o = sum over tiles of clip(q k') v, halved before each tile: a softmax would not be exact ----------------------
namespace {
enum AttentionBug {
  attention_none, no_first_turn, turn_not_given, turn_given_twice, last_turn_given_too, scores_read_early,
  probabilities_overwritten, output_scaled_early, no_fence_after_softmax, k_released_early, v_released_early,
  v_not_waited_for, no_fence_before_output_store, staging_refilled_early
};

constexpr int rows = 64, width = 64, consumers = 2, stages = 2, tiles = 5;  // rows of a consumer, and of a tile of keys

struct Shared {
  alignas(1024) bf16 q[consumers * rows * width];
  alignas(1024) bf16 k[stages][rows * width];
  alignas(1024) bf16 v[stages][rows * width];
  alignas(1024) float staging[consumers][rows * width / 2];
  alignas(8) uint64_t full_q, full_k[stages], full_v[stages], empty_k[stages], empty_v[stages];
};

__device__ void produce(Shared& s, const CUtensorMap* q, const CUtensorMap* k, const CUtensorMap* v) {
  ptx::mbarrier_arrive_expect_tx(&s.full_q, sizeof s.q);
  ptx::tma_load(s.q, q, &s.full_q, 0, 0);
  for (int i = 0; i < tiles; ++i) {
    const int stage = i % stages;
    const uint32_t parity = i / stages & 1;
    ptx::mbarrier_wait(&s.empty_k[stage], parity ^ 1);
    ptx::mbarrier_arrive_expect_tx(&s.full_k[stage], sizeof s.k[0]);
    ptx::tma_load(s.k[stage], k, &s.full_k[stage], 0, i * rows);
    ptx::mbarrier_wait(&s.empty_v[stage], parity ^ 1);
    ptx::mbarrier_arrive_expect_tx(&s.full_v[stage], sizeof s.v[0]);
    ptx::tma_load(s.v[stage], v, &s.full_v[stage], 0, i * rows);
  }
}

// Issued and committed, not waited for.
__device__ void issue_scores(float (&scores)[width / 2], const Shared& s, int consumer, int stage) {
  for (int i = 0; i < width; i += 16)
    ptx::wgmma<rows, bf16>(
        scores, ptx::matrix_descriptor(&s.q[consumer * rows * width + i], simt::Swizzle::b128, 16, 1024),
        ptx::matrix_descriptor(&s.k[stage][i], simt::Swizzle::b128, 16, 1024), i > 0);
  ptx::wgmma_commit_group();
}
__device__ void issue_output(float (&o)[width / 2], const uint32_t (&p)[rows / 16][4], const Shared& s, int stage) {
  for (int i = 0; i < rows / 16; ++i)
    ptx::wgmma<width, bf16, true>(
        o, p[i], ptx::matrix_descriptor(&s.v[stage][i * 16 * width], simt::Swizzle::b128, rows * 128, 1024), true);
  ptx::wgmma_commit_group();
}

__device__ float clip(float score) { return score < -4 ? -4 : score > 4 ? 4 : score; }
__device__ void to_operand(const float (&scores)[rows / 2], uint32_t (&p)[rows / 16][4]) {
  for (int i = 0; i < rows / 4; ++i) p[i / 4][i % 4] = ptx::pack_bf16(scores[2 * i], scores[2 * i + 1]);
}
__device__ void release(uint64_t* empty) {
  if (threadIdx.x % 128 == 0) ptx::mbarrier_arrive(empty);
}
__device__ void take_turn(int consumer) { ptx::named_barrier_sync(1 + consumer, 256); }
__device__ void give_turn(int consumer) { ptx::named_barrier_arrive(2 - consumer, 256); }  // to the other one

// Half of the columns at a time, through one buffer.
__device__ void store(const float (&o)[width / 2], Shared& s, const CUtensorMap* map, int consumer, int bug) {
  const int thread = threadIdx.x % 128, row = thread / 32 * 16 + thread % 32 / 4;
  for (int half = 0; half < 2; ++half) {
    if (half && thread == 0 && bug != staging_refilled_early) ptx::bulk_wait_group_read<0>();
    ptx::named_barrier_sync(3 + consumer, 128);
    for (int i = 0; i < width / 4; ++i)
      s.staging[consumer][(row + 8 * (i / 2 % 2)) * (width / 2) + 8 * (i / 4) + 2 * (thread % 4) + i % 2] =
          o[half * width / 4 + i];
    if (bug != no_fence_before_output_store) ptx::fence_proxy_async();
    ptx::named_barrier_sync(3 + consumer, 128);
    if (thread == 0) {
      ptx::tma_store(map, s.staging[consumer], half * width / 2, consumer * rows);
      ptx::bulk_commit_group();
    }
  }
  if (thread == 0) ptx::bulk_wait_group<0>();
}

__device__ void consume(Shared& s, const CUtensorMap* map, int consumer, float factor, int bug) {
  float scores[rows / 2], o[width / 2] = {};
  uint32_t p[rows / 16][4];
  ptx::mbarrier_wait(&s.full_q, 0);
  if (consumer == 1 && bug != no_first_turn) give_turn(consumer);
  for (int i = 0; i <= tiles; ++i) {  // the scores of tile i beside the output of the tile before
    const int stage = i % stages, before = (i + 1) % stages;
    if (i < tiles) {
      ptx::mbarrier_wait(&s.full_k[stage], i / stages & 1);
      take_turn(consumer);
      ptx::wgmma_fence();
      issue_scores(scores, s, consumer, stage);
    } else if (bug != no_fence_after_softmax) {
      ptx::wgmma_fence();
    }
    if (i > 0) {
      if (bug != v_not_waited_for) ptx::mbarrier_wait(&s.full_v[before], (i - 1) / stages & 1);
      issue_output(o, p, s, before);
    }
    // Consumer 1 has given the first turn, and keeps its last one.
    const bool give = i < tiles && (consumer == 0 || i + 1 < tiles || bug == last_turn_given_too);
    if (give && !(bug == turn_not_given && consumer == 0 && i == 2)) give_turn(consumer);
    if (bug == turn_given_twice && consumer == 0 && i == 2) give_turn(consumer);
    if (i < tiles) {
      if (bug == k_released_early) release(&s.empty_k[stage]);
      if (i == 0) ptx::wgmma_wait_group<0>();
      else if (bug != scores_read_early) ptx::wgmma_wait_group<1>();
      if (bug != k_released_early) release(&s.empty_k[stage]);
      for (float& score : scores) score = clip(score);
      if (bug == probabilities_overwritten) to_operand(scores, p);
    }
    if (i > 0) {
      if (bug == v_released_early) release(&s.empty_v[before]);
      if (bug == output_scaled_early)
        for (float& x : o) x *= factor;
      ptx::wgmma_wait_group<0>();
      if (bug != v_released_early) release(&s.empty_v[before]);
      if (i < tiles && bug != output_scaled_early)
        for (float& x : o) x *= factor;
    }
    if (i < tiles && bug != probabilities_overwritten) to_operand(scores, p);
  }
  store(o, s, map, consumer, bug);
}

__global__ void __launch_bounds__(384)
    attention_kernel(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,
                     const __grid_constant__ CUtensorMap v, const __grid_constant__ CUtensorMap o, float factor,
                     int bug) {
  Shared& s = simt::dynamic_shared<Shared>();
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&s.full_q, 1);
    for (int i = 0; i < stages; ++i) {
      ptx::mbarrier_init(&s.full_k[i], 1);
      ptx::mbarrier_init(&s.full_v[i], 1);
      ptx::mbarrier_init(&s.empty_k[i], consumers);
      ptx::mbarrier_init(&s.empty_v[i], consumers);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const int group = threadIdx.x / 128;
  if (group > 0) consume(s, &o, group - 1, factor, bug);
  else if (threadIdx.x == 0) produce(s, &q, &k, &v);
}

double run_attention(int bug) {
  const int queries = consumers * rows, keys = tiles * rows;
  const float factor = 0.5f;
  auto q = integers<bf16>(queries * width, 11), k = integers<bf16>(keys * width, 12);
  auto v = integers<bf16>(keys * width, 13);
  auto o = unwritten<float>(queries * width);
  Buffers buffers;
  auto map = [&](std::vector<bf16>& matrix, const char* name, int rows_of_box) {
    const simt::TensorShape shape{2, {width, matrix.size() / width}, {width * 2}, {width, uint32_t(rows_of_box)}};
    return simt::tensor_map(buffers.add(matrix, name), simt::DataType::bf16, shape, simt::Swizzle::b128);
  };
  const simt::TensorShape shape{2, {width, uint64_t(queries)}, {width * 4}, {width / 2, rows}};
  const CUtensorMap q_map = map(q, "q", queries), k_map = map(k, "k", rows), v_map = map(v, "v", rows);
  const CUtensorMap o_map = simt::tensor_map(buffers.add(o, "o"), simt::DataType::f32, shape, simt::Swizzle::none);
  simt::launch(attention_kernel, {dim3(1), dim3(384), sizeof(Shared)}, q_map, k_map, v_map, o_map, factor, bug);
  double worst = 0;
  std::vector<double> sum(width);
  for (int row = 0; row < queries; ++row) {
    for (double& x : sum) x = 0;
    for (int key = 0; key < keys; ++key) {
      float score = 0;
      for (int i = 0; i < width; ++i) score += float(q[row * width + i]) * float(k[key * width + i]);
      if (key % rows == 0)
        for (double& x : sum) x *= factor;
      for (int i = 0; i < width; ++i) sum[i] += double(clip(score)) * double(float(v[key * width + i]));
    }
    for (int i = 0; i < width; ++i) worst = larger(worst, std::fabs(o[row * width + i] - sum[i]));
  }
  return worst;
}
}  // namespace

const Kernel& attention() {
  static const Kernel kernel{"attention",
                             {"none", "no_first_turn", "turn_not_given", "turn_given_twice", "last_turn_given_too",
                              "scores_read_early", "probabilities_overwritten", "output_scaled_early",
                              "no_fence_after_softmax", "k_released_early", "v_released_early", "v_not_waited_for",
                              "no_fence_before_output_store", "staging_refilled_early"},
                             run_attention};
  return kernel;
}

// ---- blocks add tiles to a sum in the order of their numbers: the rounding is the same every time -------------------
namespace {
enum TurnsBug {
  turns_none, turn_passed_early, turn_passed_after_reading, turn_passed_early_in_order, turn_passed_early_among_loads,
  turn_not_passed, turn_not_awaited, turn_awaited_by_another_thread, reduce_source_overwritten, blocks_in_order,
  adds_without_turns, adds_without_turns_in_order, adds_within_a_cluster
};

constexpr int adders = 4, parts = 2, part = 512;  // parts of the sum, each with turns of its own

struct Part {
  alignas(128) float values[part];
  alignas(16) float loaded[4];
  uint64_t full;
};

// Legal in these: a block adds whenever it likes, to sums that were zero. With whole numbers the order does not matter.
__host__ __device__ bool without_turns(int bug) {
  return bug == adds_without_turns || bug == adds_without_turns_in_order || bug == adds_within_a_cluster;
}

// What a block adds. In turn, 2^24 + 1 rounds to 2^24: another order gives another sum.
__host__ __device__ float contribution(int block, int i, int bug) {
  const float large = 16777216.f;
  if (without_turns(bug)) return float(block + i % 5);
  return block == 0 ? large : block == adders - 1 ? -large : 1 + float(i % 3) * 0.25f;
}

// Many copies that are waited for stand for none that is not.
__device__ void load_often(Part& s, const float* x) {
  for (uint32_t i = 0; i < 64; ++i) {
    ptx::mbarrier_arrive_expect_tx(&s.full, sizeof s.loaded);
    ptx::bulk_load(s.loaded, x, sizeof s.loaded, &s.full);
    ptx::mbarrier_wait(&s.full, i & 1);
  }
}

__device__ void add(float* sum, Part& s, const float* x, uint32_t* turn, int bug) {  // one thread
  const uint32_t block = blockIdx.x;
  if (bug != turn_awaited_by_another_thread && !(bug == turn_not_awaited && block == 1))
    while (ptx::load_acquire(turn) != block) {
    }
  if (block == 0) ptx::bulk_store(sum, s.values, sizeof s.values);  // nobody has to clear the sum
  else ptx::bulk_reduce_add_f32(sum, s.values, sizeof s.values);
  ptx::bulk_commit_group();
  const bool early = bug == turn_passed_early || bug == turn_passed_early_in_order;
  if (block == 1 && bug == turn_passed_early_among_loads) load_often(s, x);
  else if (block == 1 && bug == turn_passed_after_reading) ptx::bulk_wait_group_read<0>();
  else if (block != 1 || !early) ptx::bulk_wait_group<0>();
  if (block != 1 || bug != turn_not_passed) ptx::store_release(turn, block + 1);
  ptx::bulk_wait_group_read<0>();
}

__device__ void add_at_once(float* sum, const Part& s, uint32_t* counter) {
  ptx::bulk_reduce_add_f32(sum, s.values, sizeof s.values);
  ptx::bulk_commit_group();
  ptx::bulk_wait_group_read<0>();
  atomicAdd(counter, 1u);  // counts work, and orders nothing
}

__global__ void turns_kernel(float* sum, const float* x, uint32_t* turns, int bug) {
  Part& s = simt::dynamic_shared<Part>();
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&s.full, 1);
    ptx::fence_mbarrier_init();
  }
  for (int i = 0; i < parts; ++i) {
    const int at = bug == adds_within_a_cluster && blockIdx.x % 2 ? parts - 1 - i : i;
    for (int j = threadIdx.x; j < part; j += 128) s.values[j] = contribution(int(blockIdx.x), j, bug);
    ptx::fence_proxy_async();
    __syncthreads();
    if (bug == turn_awaited_by_another_thread && threadIdx.x == 32)
      while (ptx::load_acquire(&turns[at]) != blockIdx.x) {
      }
    if (threadIdx.x == 0) {
      if (without_turns(bug)) add_at_once(sum + at * part, s, &turns[at]);
      else add(sum + at * part, s, x, &turns[at], bug);
    }
    if (bug == adds_within_a_cluster) ptx::cluster_sync();
    else if (bug != reduce_source_overwritten) __syncthreads();
  }
  if (threadIdx.x == 0) ptx::bulk_wait_group<0>();
}

double run_turns(int bug) {
  auto sum = unwritten<float>(parts * part), x = integers<float>(4, 14);
  if (without_turns(bug)) std::fill(sum.begin(), sum.end(), 0.f);
  std::vector<uint32_t> turns(parts, 0);
  Buffers buffers;
  // A block may wait for those of smaller number: they have run by then, unless all run together, in any order.
  const bool in_order =
      bug == blocks_in_order || bug == adds_without_turns_in_order || bug == turn_passed_early_in_order;
  const unsigned cluster = bug == adds_within_a_cluster ? 2 : 1;
  simt::launch(turns_kernel, {dim3(adders), dim3(128), sizeof(Part), cluster, !in_order}, buffers.add(sum, "sum"),
               static_cast<const float*>(buffers.add(x, "x")), buffers.add(turns, "turns"), bug);
  double worst = 0;
  for (int i = 0; i < parts * part; ++i) {
    float expected = 0;
    for (int block = 0; block < adders; ++block) expected += contribution(block, i % part, bug);
    worst = larger(worst, std::fabs(double(sum[i]) - double(expected)));
  }
  return worst;
}
}  // namespace

const Kernel& turns() {
  static const Kernel kernel{
      "turns",
      {"none", "turn_passed_early", "turn_passed_after_reading", "turn_passed_early_in_order",
       "turn_passed_early_among_loads", "turn_not_passed", "turn_not_awaited", "turn_awaited_by_another_thread",
       "reduce_source_overwritten", "blocks_in_order", "adds_without_turns", "adds_without_turns_in_order",
       "adds_within_a_cluster"},
      run_turns};
  return kernel;
}

}  // namespace seeded
