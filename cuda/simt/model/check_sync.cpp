// The hooks by which barriers, mbarriers, asynchronous operations, fences and atomics join clocks.
#if defined(SIMT_CHECKED)
#include "check_clocks.h"
#include "check_places.h"
#include "state.h"

namespace simt::model::check {

namespace {

ThreadClock& of(const Thread& thread) { return clocks.thread[thread.index]; }

}  // namespace

// ---- barriers ----
// What a relaxed arrival passes on: that the thread has come this far.
void release_passed(SyncClock& sum, Thread& thread) {
  if (!sum) sum = std::make_shared<Clock>();
  Clock &mine = clock_of(thread), passed;
  passed.passed = mine.passed;
  add(*sum, passed);
  passed.passed = mine.known;
  add(*sum, passed);
  add_entry(sum->passed, mine.self, mine.tick++);
}

void release(SyncClock& sum, Thread& thread) {
  if (!sum) sum = std::make_shared<Clock>();
  ThreadClock& mine = of(thread);
  add(*sum, mine.clock);
  mine.released_serial = sum->serial;
  mine.released_known = mine.clock.known;
  mine.released_fenced = mine.clock.fenced;
  ++mine.clock.tick;
}

void acquire(const SyncClock& sum, Thread& thread) {
  if (!sum) return;
  ThreadClock& mine = of(thread);
  Clock& clock = mine.clock;
  if (mine.released_serial == sum->serial && mine.released_known == clock.known &&
      mine.released_fenced == clock.fenced) {  // all it knows is in the sum
    clock.known = sum->known;
    clock.fenced = sum->fenced;
    join(clock.visible, sum->visible);
    join(clock.passed, sum->passed);
    join(clock.foreign, sum->foreign);
  } else {
    learn(clock, *sum);
  }
}

void everyone() {
  Clock all;
  for (ThreadClock& thread : clocks.thread) add(all, thread.clock);
  for (ThreadClock& thread : clocks.thread) {
    thread.clock.known = all.known;
    thread.clock.fenced = all.fenced;
    thread.clock.visible = all.visible;
    thread.clock.passed = all.passed;
    thread.clock.foreign = all.foreign;
    ++thread.clock.tick;
  }
}

// ---- mbarriers ----
namespace {

// Whoever uses an mbarrier must know that it was initialised, whether or not that came first this time.
std::string not_initialised(const uint64_t* barrier, const MbarrierClock& mbarrier, const Clock& user) {
  if (mbarrier.initialiser == nobody || user.knows(mbarrier.initialiser) >= mbarrier.tick) return "";
  if (mbarrier.fence_tick && user.knows_passed(mbarrier.initialiser) >= mbarrier.fence_tick) return "";
  return "mbarrier " + where(barrier) + " is used without a barrier after its mbarrier.init by " +
         describe(worker->gang.threads[mbarrier.initialiser]) + " at " + line_text(place_of(mbarrier.site));
}

// A copy's bytes are counted by the async proxy, which does not see an mbarrier.init without a fence.
std::string not_fenced(const uint64_t* barrier, const MbarrierClock& mbarrier, const Clock& user) {
  if (mbarrier.initialiser == nobody || user.knows_fenced(mbarrier.initialiser) >= mbarrier.tick) return "";
  if (mbarrier.fence_tick && user.knows_passed(mbarrier.initialiser) >= mbarrier.fence_tick) return "";
  return "a copy counts on mbarrier " + where(barrier) + " without a fence_mbarrier_init after its mbarrier.init by " +
         describe(worker->gang.threads[mbarrier.initialiser]) + " at " + line_text(place_of(mbarrier.site));
}

}  // namespace

void mbarrier_init(uint64_t* barrier, Thread& thread, Site site) {
  MbarrierClock& mbarrier = clocks.mbarriers[barrier] = {};
  mbarrier.initialiser = thread.index;
  mbarrier.tick = clock_of(thread).tick++;
  mbarrier.site = site;
}

void fence_mbarrier_init(Thread& thread) {
  Clock& clock = clock_of(thread);
  for (auto& [barrier, mbarrier] : clocks.mbarriers)
    if (mbarrier.initialiser == thread.index && !mbarrier.fence_tick) mbarrier.fence_tick = clock.tick;
  ++clock.tick;
}

void mbarrier_use(uint64_t* barrier, Thread& thread, Site site) {
  const std::string mistake = not_initialised(barrier, clocks.mbarriers[barrier], clock_of(thread));
  if (!mistake.empty()) fail(mistake, site);
}

void mbarrier_arrive(uint64_t* barrier, Thread& thread, Site site) {
  mbarrier_use(barrier, thread, site);
  Clock& clock = clock_of(thread);
  add(clocks.mbarriers[barrier].arriving, clock);
  ++clock.tick;
}

void mbarrier_arrive(uint64_t* barrier, const Snapshot& by, Site issued) {
  MbarrierClock& mbarrier = clocks.mbarriers[barrier];
  std::string mistake = not_initialised(barrier, mbarrier, *by.clock);
  if (mistake.empty() && clocks.kind(by.agent) == Agent::tma) mistake = not_fenced(barrier, mbarrier, *by.clock);
  if (!mistake.empty()) fail_issued(mistake, issued, *worker->gang.threads[by.clock->issuer].cta);
  Clock& sum = mbarrier.arriving;
  add(sum, *by.clock);
  add_entry(sum.known, by.agent, by.tick);
}

void mbarrier_phase_done(uint64_t* barrier) {
  MbarrierClock& mbarrier = clocks.mbarriers[barrier];
  add(mbarrier.done, mbarrier.arriving);
  mbarrier.arriving = {};
}

void mbarrier_acquire(uint64_t* barrier, Thread& thread, Site site) {
  mbarrier_use(barrier, thread, site);
  learn(clock_of(thread), clocks.mbarriers[barrier].done);
}

// ---- asynchronous operations ----
void issue(Snapshot& snapshot, Thread& thread, Agent agent) {
  Clock& clock = clock_of(thread);
  if (!snapshot.clock) {
    snapshot.clock = std::make_shared<Clock>();
    if (agent != Agent::wgmma) *snapshot.clock = clock;
    snapshot.clock->time = ++clocks.time;
    snapshot.clock->issuer = thread.index;
    const unsigned warpgroups = clocks.threads + lanes;
    const unsigned block = thread.index / clocks.block_threads;
    if (agent == Agent::tma) snapshot.agent = clocks.threads + clocks.next_lane++ % (lanes - write_lanes);
    if (agent == Agent::tma_write)
      snapshot.agent = clocks.threads + lanes - write_lanes + clocks.next_write_lane++ % write_lanes;
    if (agent == Agent::wgmma)
      snapshot.agent = warpgroups + block * clocks.warpgroups_of_block + thread.linear / 128;
    if (agent == Agent::cp_async)
      snapshot.agent = warpgroups + clocks.blocks * clocks.warpgroups_of_block + thread.index;
    const size_t counter = snapshot.agent - clocks.threads;
    if (clocks.agent_tick.size() <= counter) clocks.agent_tick.resize(counter + 1);
    snapshot.tick = ++clocks.agent_tick[counter];
  }
  if (agent == Agent::wgmma) {
    auto& warp = snapshot.warp[thread.linear / 32 % 4];
    if (!warp) warp = std::make_shared<Clock>();
    add(*warp, clock);
  }
  ++clock.tick;
}

Snapshot of_warp(const Snapshot& snapshot, unsigned warp) {
  Snapshot one{std::make_shared<Clock>(*snapshot.warp[warp]), snapshot.agent, snapshot.tick, {}};
  one.clock->time = snapshot.clock->time;
  one.clock->issuer = snapshot.clock->issuer;
  return one;
}

namespace {

Known known_by_all(const std::shared_ptr<Clock> (&clocks)[4], Known Clock::*which) {
  for (const auto& clock : clocks)
    if (!((*clock).*which)) return nullptr;
  auto all = std::make_shared<Ticks>(*((*clocks[0]).*which));
  for (const auto& clock : clocks) {
    const Ticks& its = *((*clock).*which);
    if (its.size() < all->size()) all->resize(its.size());
    for (size_t i = 0; i < all->size(); ++i) (*all)[i] = std::min((*all)[i], its[i]);
  }
  return all;
}

}  // namespace

Snapshot of_each_warp(const Snapshot& snapshot) {
  Snapshot all = of_warp(snapshot, 0);
  all.clock->known = known_by_all(snapshot.warp, &Clock::known);
  all.clock->fenced = known_by_all(snapshot.warp, &Clock::fenced);
  all.clock->passed = known_by_all(snapshot.warp, &Clock::passed);
  return all;
}

void acquire(const Snapshot& snapshot, Thread& thread) {
  if (snapshot.clock) learn(clock_of(thread).known, snapshot.agent, snapshot.tick);
}

// ---- fences ----
void fence_proxy(Thread& thread) {
  Clock& clock = clock_of(thread);
  clock.fenced = clock.known;
  clock.fenced_tick = clock.tick++;
}

// At any scope: one too narrow is not noticed.
void fence_memory(Thread& thread) {
  Clock& clock = clock_of(thread);
  clock.visible = clock.known;
  clock.visible_tick = clock.tick++;
}

// ---- atomics: acquire and release at their address, across gangs ----
namespace {

Clock& sum_at(const void* pointer, bool in_shared) {
  AddressClock& here = (in_shared ? clocks.shared_addresses : clocks.global_addresses)[pointer];
  if (here.gang != clocks.gang) {
    if (here.sum.known || here.sum.passed) {  // what an earlier gang released
      auto foreign = std::make_shared<std::vector<Earlier>>();
      if (here.sum.foreign) *foreign = *here.sum.foreign;
      foreign->push_back({here.gang, here.sum.known, here.sum.passed});
      Clock fresh;
      fresh.foreign = foreign;
      here.sum = fresh;
    }
    here.gang = clocks.gang;
  }
  return here.sum;
}

// What a relaxed atomic or a volatile store passes on: what __threadfence has made visible, be it another thread's of
// which this one knows; and that whatever came before is over.
void add_visible(Clock& sum, Clock& mine) {
  Clock visible;
  visible.known = visible.visible = mine.visible;
  visible.fenced = mine.fenced;
  visible.passed = mine.passed;
  visible.foreign = mine.foreign;
  add(sum, visible);
  add_entry(sum.known, mine.self, mine.visible_tick);
  add_entry(sum.visible, mine.self, mine.visible_tick);
  add_entry(sum.fenced, mine.self, mine.fenced_tick);
  add_entry(sum.passed, mine.self, mine.tick++);
}

}  // namespace

// An atomic acquires, with or without a __threadfence after it: lenient.
void synchronise(const void* pointer, bool in_shared, Thread& thread) {
  Clock &sum = sum_at(pointer, in_shared), &mine = clock_of(thread);
  learn(mine, sum);
  add_visible(sum, mine);
}

void volatile_access(const void* pointer, bool in_shared, bool writes, Thread& thread) {
  Clock &sum = sum_at(pointer, in_shared), &mine = clock_of(thread);
  writes ? add_visible(sum, mine) : learn(mine, sum);
}

void release_at(const void* pointer, bool in_shared, Thread& thread) {
  Clock& mine = clock_of(thread);
  add(sum_at(pointer, in_shared), mine);
  ++mine.tick;
}

bool knows_foreign(const Foreign& foreign, uint32_t gang, uint32_t agent, uint32_t tick, bool passed) {
  if (!foreign) return false;
  auto here = std::lower_bound(foreign->begin(), foreign->end(), gang,
                               [](const Earlier& earlier, uint32_t gang) { return earlier.gang < gang; });
  if (here == foreign->end() || here->gang != gang) return false;
  return tick_of(here->known, agent) >= tick || (passed && tick_of(here->passed, agent) >= tick);
}

bool turn_was_passed(const ReductionId& first, const ReductionId& second) {
  const auto before = clocks.reductions.find(first), after = clocks.reductions.find(second);
  if (before == clocks.reductions.end() || after == clocks.reductions.end()) return false;
  const Clock &issue = *before->second, &next = *after->second;
  if (first.gang != second.gang) return knows_foreign(next.foreign, first.gang, issue.issuer, issue.tick + 1, false);
  // The blocks of a cluster hear of each other all the time; that need not be a turn.
  const auto cluster = [](const Clock& clock) { return worker->gang.threads[clock.issuer].cta->cluster; };
  return cluster(issue) != cluster(next) && next.knows(issue.issuer) > issue.tick;
}

void forget_addresses() {
  clocks.global_addresses.clear();
  clocks.reductions.clear();
}

}  // namespace simt::model::check
#endif
