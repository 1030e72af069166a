// Where threads meet: __syncthreads and named barriers, cluster barriers, warp operations, and the register pool that
// setmaxnreg draws on.
#include <algorithm>
#include <cstring>

#include "state.h"
#include "trace.h"

namespace simt::model {

namespace {

// A barrier of all threads of the only block: the checker can order them all at once.
bool is_full(const Cta& block, const Barrier& barrier) {
  return barrier.expected == 0 && block.gang->blocks.size() == 1;
}

void complete(Cta& block, Barrier& barrier, Thread* last) {
  if (is_full(block, barrier)) {
    check::everyone();
  } else {
    if (last) check::acquire(barrier.clock, *last);
    for (Thread* thread : barrier.waiting) check::acquire(barrier.clock, *thread);
  }
  barrier.clock = {};
  barrier.arrived = barrier.expected = 0;
  std::vector<Thread*> waiting;
  waiting.swap(barrier.waiting);
  for (Thread* thread : waiting) wake(thread);
  waiting.clear();
  barrier.waiting.swap(waiting);  // keeps its capacity
}

// Barrier 0 of all threads is __syncthreads, whichever way it is written. Where a number is given, the hardware counts
// whole warps: the first lane of a warp that is not full stands for those that do not exist.
int weight(const Thread& thread, int threads) {
  const unsigned first = thread.linear / 32 * 32, lanes = std::min(32u, thread.cta->count - first);
  return threads && thread.linear == first ? int(33 - lanes) : 1;
}

Barrier& enter(Cta& block, int id, int threads, Site site) {
  if (id < 0 || id > 15) fail("named barrier " + std::to_string(id) + ": ids are 0 to 15", site);
  if (threads < 0 || threads % 32)
    fail("named barrier " + std::to_string(id) + ": " + std::to_string(threads) + " threads, not a multiple of 32", site);
  if (!id && threads == int((block.count + 31) / 32 * 32)) threads = 0;
  Barrier& barrier = block.barriers[id];
  const auto text = [](int expected) { return expected ? std::to_string(expected) : "all"; };
  if (barrier.arrived && barrier.expected != threads)
    fail("named barrier " + std::to_string(id) + ": it expects " + text(threads) + " threads here, but " +
             text(barrier.expected) + " where others arrived",
         site);
  aligned(site);
  barrier.expected = threads;
  Thread& thread = *self();
  if (!is_full(block, barrier)) check::release(barrier.clock, thread);
  barrier.arrived += weight(thread, threads);
  barrier.last = &thread;
  barrier.last_site = site;
  return barrier;
}

bool is_complete(const Cta& block, const Barrier& barrier) {
  return barrier.arrived >= (barrier.expected ? barrier.expected : int(block.alive));
}

unsigned living(const Cluster& cluster) {
  unsigned count = 0;
  for (const Cta* block : cluster.blocks) count += block->alive;
  return count;
}

void complete_if_all_arrived(Cluster& cluster) {
  if (!cluster.arrived || cluster.arrived < living(cluster)) return;
  cluster.arrived = 0;
  ++cluster.phase;
  cluster.done = std::move(cluster.clock);
  cluster.clock = {};
  for (Thread* thread : cluster.waiting) {
    check::acquire(cluster.done, *thread);
    wake(thread);
  }
  cluster.waiting.clear();
}

}  // namespace

// Lanes run one after the other here: the n-th .aligned instruction of each must be that of the first to come.
void aligned(Site site) {
  Thread& thread = *self();
  Warp& warp = thread.cta->warps[thread.linear / 32];
  const unsigned lanes = std::min(32u, thread.cta->count - thread.linear / 32 * 32);
  const uint64_t number = thread.aligned++ - warp.first_aligned;
  if (number == warp.aligned.size()) warp.aligned.push_back({site, warp.exited});
  Aligned& here = warp.aligned[number];
  if (here.site.line != site.line || (here.site.file != site.file && strcmp(here.site.file, site.file)))
    fail("lanes of one warp execute different .aligned instructions: others are, or were, at " + at(here.site), site);
  here.lanes |= 1u << thread.linear % 32;
  for (; !warp.aligned.empty() && (warp.aligned.front().lanes | warp.exited) == ~0u >> (32 - lanes); ++warp.first_aligned)
    warp.aligned.pop_front();
}

void barrier_sync(int id, int threads, Site site) {
  Inside inside;
  Thread& thread = *self();
  Cta& block = *thread.cta;
  Barrier& barrier = enter(block, id, threads, site);
  check::count(check::Count::barrier_waits, 1, site);
  trace("barrier sync", id, threads, site);
  if (is_complete(block, barrier)) return complete(block, barrier, &thread);
  barrier.waiting.push_back(&thread);
  block_on(Waits::barrier, &barrier, uint64_t(id), site);
}

void barrier_arrive(int id, int threads, Site site) {
  Inside inside;
  if (!threads) fail("bar.arrive needs the number of threads", site);
  Cta& block = *self()->cta;
  Barrier& barrier = enter(block, id, threads, site);
  trace("barrier arrive", id, threads, site);
  if (is_complete(block, barrier)) complete(block, barrier, nullptr);
}

void cluster_arrive(bool release, Site site) {
  Inside inside;
  aligned(site);
  Thread& thread = *self();
  Cluster& cluster = *thread.cta->cluster;
  if (thread.cluster_arrived) fail("barrier.cluster.arrive twice without a wait between", site);
  thread.cluster_arrived = true;
  thread.cluster_phase = cluster.phase;
  release ? check::release(cluster.clock, thread) : check::release_passed(cluster.clock, thread);
  ++cluster.arrived;
  complete_if_all_arrived(cluster);
}

void cluster_wait(Site site) {
  Inside inside;
  aligned(site);
  Thread& thread = *self();
  Cluster& cluster = *thread.cta->cluster;
  if (!thread.cluster_arrived) fail("barrier.cluster.wait without an arrive before it", site);
  thread.cluster_arrived = false;
  check::count(check::Count::barrier_waits, 1, site);
  if (cluster.phase != thread.cluster_phase) return check::acquire(cluster.done, thread);
  cluster.waiting.push_back(&thread);
  block_on(Waits::cluster, &cluster, cluster.phase, site);
}

void leave_barriers(Thread& thread) {
  Cta& block = *thread.cta;
  block.warps[thread.linear / 32].exited |= 1u << thread.linear % 32;
  Cluster& cluster = *block.cluster;
  if (thread.cluster_arrived && thread.cluster_phase == cluster.phase) --cluster.arrived;  // it no longer counts
  Barrier& barrier = block.barriers[0];
  if (!is_full(block, barrier)) check::release(barrier.clock, thread);  // to exit is to arrive, here and below
  if (block.gang->blocks.size() > 1) check::release(cluster.clock, thread);
  if (barrier.arrived && !barrier.expected && is_complete(block, barrier)) complete(block, barrier, nullptr);
  complete_if_all_arrived(cluster);
}

// All threads have exited: whoever synced has been let through, so what is left has come by bar.arrive.
std::string barrier_leftover(const Cta& block) {
  for (int id = 0; id < 16; ++id) {
    const Barrier& barrier = block.barriers[id];
    if (!barrier.arrived) continue;
    return "named barrier " + std::to_string(id) + " of " + block_name(block) + ", which has ended, is left with " +
           std::to_string(barrier.arrived) + " of " + std::to_string(barrier.expected) +
           " arrivals: nobody waits for them; the last is that of " + describe(*barrier.last) + " at " +
           at(barrier.last_site);
  }
  return "";
}

// ---- warps ---------------------------------------------------------------------------------------------------------

void warp_collective(unsigned mask, WarpOp kind, void* payload, void (*operate)(void**, unsigned), Site site) {
  Inside inside;
  Thread& thread = *self();
  Cta& block = *thread.cta;
  const unsigned lane = thread.linear % 32, lanes = std::min(32u, block.count - thread.linear / 32 * 32);
  if (lanes < 32) mask &= (1u << lanes) - 1;
  if (!(mask >> lane & 1)) fail("a lane takes part in a warp operation whose mask does not name it", site);
  auto& open = block.warps[thread.linear / 32].open;
  size_t i = 0;
  while (i < open.size() && open[i].mask != mask) ++i;
  if (i == open.size()) open.push_back({mask, 0, kind, site, {}, {}, {}});
  if (open[i].kind != kind)
    fail("lanes of one warp meet in different operations: the others are at " + at(open[i].site), site);
  open[i].arrived |= 1u << lane;
  open[i].payload[lane] = payload;
  open[i].lane[lane] = &thread;
  if (kind == WarpOp::syncwarp) check::release(open[i].clock, thread);
  if (open[i].arrived != mask) return block_on(Waits::warp, &block.warps[thread.linear / 32], mask, site);
  Collective all = std::move(open[i]);
  open.erase(open.begin() + long(i));
  if (operate) operate(all.payload, mask);
  for (int l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    if (kind == WarpOp::syncwarp) check::acquire(all.clock, *all.lane[l]);
    if (all.lane[l] != &thread) wake(all.lane[l]);
  }
}

// PTX promises one leader for a mask, not which. Orders that look for trouble take another than the lowest lane.
bool elect(unsigned mask, Site site) {
  struct Election {
    unsigned leader;
  } election{0};
  warp_collective(mask, WarpOp::elect, &election, [](void** payloads, unsigned mask) {
    const Order order = worker->options.order;
    unsigned leader = unsigned(__builtin_ctz(mask));
    if (order == Order::random || order == Order::priority) {
      unsigned skip = unsigned(worker->options.seed * 2654435761u >> 7) % unsigned(__builtin_popcount(mask));
      for (unsigned rest = mask; skip-- > 0;) leader = unsigned(__builtin_ctz(rest &= rest - 1));
    }
    for (int lane = 0; lane < 32; ++lane)
      if (mask >> lane & 1) static_cast<Election*>(payloads[lane])->leader = leader;
  }, site);
  return election.leader == self()->linear % 32;
}

// ---- setmaxnreg: registers belong to the block; a warp that gives some back lets another have them --------------------

void set_registers(int registers, bool increase, Site site) {
  Thread& thread = *self();
  Cta& block = *thread.cta;
  aligned(site);
  warp_collective(~0u, WarpOp::setmaxnreg, nullptr, nullptr, site);
  Inside inside;
  Warp& warp = block.warps[thread.linear / 32];
  if (thread.linear % 32 == 0) ++warp.registers_set, warp.registers_site = site;
  if (warp.registers == registers) return;  // another lane has done it
  if (increase != (registers > warp.registers))
    fail(std::string("setmaxnreg.") + (increase ? "inc" : "dec") + " to " + std::to_string(registers) +
             " registers from " + std::to_string(warp.registers),
         site);
  while (warp.registers != registers && (registers - warp.registers) * 32 > block.free_registers)
    block_on(Waits::registers, &block, uint64_t(registers), site);
  if (warp.registers == registers) return;
  block.free_registers -= (registers - warp.registers) * 32;
  warp.registers = registers;
  for (unsigned i = 0; i < block.count; ++i)
    if (block.threads[i].state == State::waiting && block.threads[i].waits == Waits::registers) wake(&block.threads[i]);
}

}  // namespace simt::model
