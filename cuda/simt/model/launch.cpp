// A grid: its limits, its blocks cut into gangs (clusters), the gangs dealt to OS threads, the first mistake raised.
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <system_error>
#include <thread>

#include "state.h"

namespace simt {

Options& options() {
  static thread_local Options options;
  return options;
}

namespace model {

Locks& locks() {
  static Locks& all = []() -> Locks& {
    pthread_atfork(
        [] {
          locks().grid.lock();
          locks().watchdog.lock();
          locks().pool.lock();
          locks().atomics.lock();
        },
        [] {
          locks().atomics.unlock();
          locks().pool.unlock();
          locks().watchdog.unlock();
          locks().grid.unlock();
        },
        [] {
          locks().atomics.unlock();
          locks().pool.unlock();
          locks().watchdog.unlock();
          locks().grid.unlock();
        });
    return *new Locks;  // never destroyed: the watchdog's thread outlives main
  }();
  return all;
}

namespace {

constexpr size_t shared_bytes_limit = 227 * 1024;
constexpr uint64_t register_file = 65536;
// A stack is two mappings, one of them its guard; Linux allows a process 65530 (vm.max_map_count).
constexpr size_t stacks_limit = 31 * 1024;
constexpr size_t gap = 4096;  // between blocks' shared memory: an overrun of one is not in another

struct Grid {
  dim3 grid, block;
  size_t shared_bytes;
  unsigned cluster;
  bool co_resident;
  uint64_t threads() const { return uint64_t(block.x) * block.y * block.z; }
  uint64_t blocks() const { return uint64_t(grid.x) * grid.y * grid.z; }
  uint64_t blocks_of_gang() const { return co_resident ? blocks() : cluster; }
};

void refuse(const std::string& what) { throw Error("launch: " + what); }

void check_limits(const Grid& g) {
  auto text = [](auto value) { return std::to_string(value); };
  if (!g.grid.x || !g.grid.y || !g.grid.z || !g.threads()) refuse("a grid and a block need at least one thread");
  if (g.block.x > 1024 || g.block.y > 1024 || g.block.z > 64 || g.threads() > 1024)
    refuse("a block has at most 1024 threads, 64 along z; got " + text(g.block.x) + "x" + text(g.block.y) + "x" +
           text(g.block.z));
  if (g.grid.x > 0x7fffffffu || g.grid.y > 65535 || g.grid.z > 65535)
    refuse("a grid has at most 65535 blocks along y and z; got " + text(g.grid.y) + " and " + text(g.grid.z));
  if (g.shared_bytes > shared_bytes_limit)
    refuse("a block has at most " + text(shared_bytes_limit) + " bytes of shared memory; got " + text(g.shared_bytes));
  if (!g.cluster || g.cluster > 8) refuse("a cluster has 1 to 8 blocks; got " + text(g.cluster));
  if (g.grid.x % g.cluster)
    refuse("grid.x = " + text(g.grid.x) + " is not a multiple of the cluster's " + text(g.cluster) + " blocks");
  if (g.blocks_of_gang() > stacks_limit || g.blocks_of_gang() * g.threads() > stacks_limit)
    refuse("blocks that wait for each other may have " + text(stacks_limit) + " threads in all here; got " +
           text(g.blocks_of_gang() * g.threads()));
}

void set_up_block(Worker& w, const Grid& g, Cta& block, uint64_t number, char* shared) {
  block.index = {unsigned(number % g.grid.x), unsigned(number / g.grid.x % g.grid.y),
                 unsigned(number / g.grid.x / g.grid.y)};
  block.gang = &w.gang;
  block.count = block.alive = unsigned(g.threads());
  block.shared = shared;
  block.shared_bytes = g.shared_bytes;
  for (Barrier& barrier : block.barriers) barrier = {};
  block.warps.assign((block.count + 31) / 32, {});
  const int registers = int(std::min<uint64_t>(255, register_file / ((block.count + 31) / 32 * 32)) / 8 * 8);
  for (Warp& warp : block.warps) {
    warp.registers = registers;
    warp.rank = int(w.random() % 65536);
  }
  block.free_registers = 0;
  for (unsigned i = 0; i < block.count; ++i) {
    Thread& thread = block.threads[i];
    thread = Thread();
    thread.thread_index = {i % g.block.x, i / g.block.x % g.block.y, i / g.block.x / g.block.y};
    thread.block_index = block.index;
    thread.block_size = g.block;
    thread.grid_size = g.grid;
    thread.linear = i;
    thread.index = unsigned(&thread - w.gang.threads.data());
    thread.cta = &block;
  }
}

void set_up_gang(Worker& w, const Grid& g, uint64_t number) {
  Gang& gang = w.gang;
  const size_t blocks = g.blocks_of_gang(), each = (g.shared_bytes + gap + 1023) / 1024 * 1024;
  gang.index = number;
  gang.blocks.resize(blocks);
  gang.clusters.resize(blocks / g.cluster);
  gang.threads.resize(blocks * g.threads());
  gang.alive = unsigned(gang.threads.size());
  gang.mbarrier_waiting.clear();
  w.random_state = w.options.seed * 0x9e3779b97f4a7c15ull + number;
  if (w.arena_bytes < 2 * each * blocks) {
    free(w.arena);
    w.arena_bytes = (2 * each * blocks + 4095) / 4096 * 4096;
    w.arena = static_cast<char*>(aligned_alloc(4096, w.arena_bytes));
    if (!w.arena) throw std::bad_alloc();
  }
  for (size_t i = 0; i < blocks; ++i) {
    auto& block = gang.blocks[i];
    if (!block) block = std::make_unique<Cta>();
    block->threads = gang.threads.data() + i * g.threads();
    set_up_block(w, g, *block, number * blocks + i, w.arena + 2 * i * each);
    block->shared_async = block->shared + each;
    // NaN in every float format: nobody may rely on what shared memory held before.
    memset(block->shared, 0xff, g.shared_bytes);
    memset(block->shared_async, 0xff, g.shared_bytes);
    auto& cluster = gang.clusters[i / g.cluster];
    if (!cluster) cluster = std::make_unique<Cluster>();
    if (i % g.cluster == 0) *cluster = {};
    cluster->blocks.push_back(block.get());
    block->cluster = cluster.get();
    block->rank = unsigned(i % g.cluster);
    for (unsigned t = 0; t < block->count; ++t) {
      block->threads[t].cluster_rank = block->rank;
      block->threads[t].cluster_size = g.cluster;
    }
  }
  async_reset(gang);
}

std::string run_gang(Worker& w, const Grid& g, uint64_t number) {
  w.error.clear();
  set_up_gang(w, g, number);
  check::begin_gang(w.gang);
  run_threads(w);
  check::end_gang(w.gang);
  return w.error;
}

// Workers keep their stacks and shared memory from launch to launch.
std::vector<Worker*>& pool() {
  static auto* workers = new std::vector<Worker*>;  // never destroyed: a launch may come from an exit handler
  return *workers;
}
Worker* borrow_worker() {
  Worker* w = nullptr;
  {
    std::lock_guard lock(locks().pool);
    if (!pool().empty()) {
      w = pool().back();
      pool().pop_back();
    }
  }
  if (!w) w = new Worker;
  // What runs on a stack may have kept the address of a thread-local variable.
  if (w->home != std::this_thread::get_id()) take_stacks_back(*w);
  w->home = std::this_thread::get_id();
  return w;
}
void return_worker(Worker* w) {
  std::lock_guard lock(locks().pool);
  pool().push_back(w);
}

unsigned worker_count([[maybe_unused]] const Options& options, [[maybe_unused]] const Grid& g) {
#if defined(SIMT_CHECKED)
  return 1;  // the checker orders all accesses of a grid
#else
  if (options.trace) return 1;
  const unsigned wanted = options.workers > 0 ? unsigned(options.workers) : std::max(1u, std::thread::hardware_concurrency());
  const uint64_t gangs = g.blocks() / g.blocks_of_gang(), stacks = g.blocks_of_gang() * g.threads();
  return unsigned(std::min<uint64_t>({wanted, gangs, std::max<uint64_t>(1, stacks_limit / stacks), 31}));
#endif
}

}  // namespace

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster, bool co_resident, void (*entry)(void*),
              void* argument, const void* kernel) {
#if defined(SIMT_CHECKED)
  std::lock_guard lock(locks().grid);
#endif
  const Grid g{grid, block, shared_bytes, cluster, co_resident};
  check_limits(g);
  const uint64_t gangs = g.blocks() / g.blocks_of_gang();
  const Options options = simt::options();
  const unsigned workers = worker_count(options, g);
  std::atomic<int> going{int(workers)};
  std::atomic<uint64_t> next{0};
  std::atomic<bool> failed{false};
  std::mutex error_mutex;
  std::string error;
  auto work = [&] {
    Worker* const mine = borrow_worker();
    Worker* const outer = worker;
    ThreadContext* const outer_thread = current;
    worker = mine;
    mine->options = options;
    mine->entry = entry;
    mine->argument = argument;
    mine->going = &going;
    mine->alone = workers == 1;
    mine->stuck = false;
    uint64_t gang;
    while (!failed && (gang = next++) < gangs) {
      std::string report;
      try {
        report = run_gang(*mine, g, gang);
      } catch (const std::exception& caught) {
        report = caught.what();
      }
      if (report.empty()) continue;
      std::lock_guard lock(error_mutex);
      if (!failed) error = std::move(report);
      failed = true;
    }
    if (!mine->stuck) --going;
    worker = outer;
    current = outer_thread;
    return_worker(mine);
  };
  check::begin_grid(kernel, argument);
  std::vector<std::thread> others;
  try {
    for (unsigned i = 1; i < workers; ++i) others.emplace_back(work);
  } catch (const std::system_error&) {  // no more OS threads: those there are do the work
    going -= int(workers - 1 - others.size());
  }
  work();
  for (std::thread& other : others) other.join();
  if (failed) throw Error(error);
}

void* shared_memory(size_t bytes, Site site) {
  const Cta& block = *self()->cta;
  if (bytes > block.shared_bytes)
    fail("dynamic_shared: a type of " + std::to_string(bytes) + " bytes, but the launch gave the block " +
             std::to_string(block.shared_bytes),
         site);
  return block.shared;
}

}  // namespace model
}  // namespace simt
