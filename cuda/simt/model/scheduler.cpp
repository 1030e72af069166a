// Which CUDA thread runs next. Threads give way only inside the model, so an order of threads is a schedule; it is
// chosen by Options.order and the seed. When nobody can run, a delayed asynchronous operation happens; when there is
// none either, the block is deadlocked.
#include <algorithm>
#include <chrono>
#include <cstdio>

#include "state.h"

namespace simt::model {

__thread ThreadContext* current;
__thread Worker* worker;

void fiber_entry();

namespace {

constexpr unsigned polls_before_yield = 32;      // atomics are not all spins
constexpr uint64_t idle_rounds_allowed = 100;    // all threads that could run asked in vain, this often
constexpr uint64_t leader_falls_back_every = 4096;

void enqueue(Thread* thread) {
  thread->state = State::ready;
  thread->waits = Waits::nothing;
  if (worker->options.order == Order::priority)
    thread->cta->warps[thread->linear / 32].ready.push_back(thread);
  else
    worker->ready.push_back(thread);
}

Thread* take(std::vector<Thread*>& from, size_t index) {
  std::swap(from[index], from.back());
  Thread* thread = from.back();
  from.pop_back();
  return thread;
}

// A warp runs as far ahead of the others as its waits allow; now and then the leader becomes the last.
Thread* take_by_priority(Worker& w) {
  Warp *best = nullptr, *leader = nullptr;
  int lowest = 0;
  for (auto& block : w.gang.blocks)
    for (Warp& warp : block->warps) {
      if (!leader || warp.rank > leader->rank) leader = &warp;
      lowest = std::min(lowest, warp.rank);
      if (!warp.ready.empty() && (!best || warp.rank > best->rank)) best = &warp;
    }
  if (w.random() % leader_falls_back_every == 0) leader->rank = lowest - 1;
  return best ? take(best->ready, w.random() % best->ready.size()) : nullptr;
}

Thread* dequeue(Worker& w) {
  if (w.options.order == Order::priority) return take_by_priority(w);
  if (w.head == w.ready.size()) return nullptr;
  if (w.options.order == Order::fifo) {
    Thread* thread = w.ready[w.head++];
    if (w.head == w.ready.size() || w.head == 65536) {
      w.ready.erase(w.ready.begin(), w.ready.begin() + w.head);
      w.head = 0;
    }
    return thread;
  }
  return take(w.ready, w.options.order == Order::random ? w.random() % w.ready.size() : w.ready.size() - 1);
}

void set_stuck(Worker& w, bool stuck) {
  if (w.stuck != stuck) *w.going += stuck ? -1 : 1;
  w.stuck = stuck;
}

// A block may wait for blocks of smaller number, which other OS threads run. That is no deadlock as long as one of those
// goes on; when none does, the one that was helped last gets some time to find out.
bool others_go_on(Worker& w) {
  if (w.idle_rounds < idle_rounds_allowed / 2) return false;
  set_stuck(w, true);
  if (*w.going > 0) {
    w.idle_rounds = idle_rounds_allowed / 2;
    std::this_thread::yield();
    return true;
  }
  if (!w.alone) std::this_thread::sleep_for(std::chrono::milliseconds(5));
  return false;
}

// The next to run; null when the gang is over. Raises Error on a deadlock.
Thread* pick() {
  Worker& w = *worker;
  for (;;) {
    ++w.steps;
    if (w.options.async == Async::random && async_pending(w.gang) && w.random() % 16 == 0) async_progress(w.gang);
    if (w.stuck && w.progress != w.progress_seen) set_stuck(w, false);
    if (Thread* thread = dequeue(w)) return thread;
    if (!w.gang.alive) return nullptr;
    if (async_progress(w.gang)) {
      ++w.progress;
      continue;
    }
    if (w.progress != w.progress_seen)
      w.progress_seen = w.progress, w.idle_rounds = 0;
    else if (w.polling.empty() || (!others_go_on(w) && ++w.idle_rounds > idle_rounds_allowed))
      deadlock(w);
    for (Thread* thread : w.polling) enqueue(thread);
    w.polling.clear();
  }
}

void become(Thread* thread) {
  current = thread;
  thread->state = State::running;
}

void go_on_with(Fiber& from, Thread* next) {  // null: back to run_threads
  Worker& w = *worker;
  if (!next) {
    current = nullptr;
    return Fiber::switch_to(from, w.main);
  }
  if (!next->fiber) {
    if (w.free_fibers.empty()) {
      w.fibers.push_back(std::make_unique<Fiber>(fiber_entry));
      w.free_fibers.push_back(w.fibers.back().get());
    }
    next->fiber = w.free_fibers.back();
    w.free_fibers.pop_back();
  }
  become(next);
  Fiber::switch_to(from, *next->fiber);
}

void give_way() {
  Thread* thread = self();
  Thread* next = pick();
  if (next == thread) return become(thread);
  go_on_with(*thread->fiber, next);
}

void leave(Thread& thread) {
  Cta& block = *thread.cta;
  thread.state = State::done;
  --block.alive;
  --block.gang->alive;
  ++worker->progress;
  leave_barriers(thread);
  if (block.alive) return;
  std::string leftover = async_leftover(block);
  if (leftover.empty()) leftover = barrier_leftover(block);
  for (size_t w = 0; w < block.warps.size(); ++w) {
    const Warp &first = block.warps[w / 4 * 4], &warp = block.warps[w];
    if (!leftover.empty() || warp.registers_set == first.registers_set) continue;
    leftover = "setmaxnreg at " + at((warp.registers_set > first.registers_set ? warp : first).registers_site) +
               " by some of the warps of warpgroup " + std::to_string(w / 4) + " of " + block_name(block) +
               " only: all four must execute it";
  }
  if (!leftover.empty()) throw Error(leftover);
  async_exit(block);
}

}  // namespace

// What a fiber runs: one thread after the other, as long as threads that have not started are next.
void fiber_entry() {
  Worker& w = *worker;
  for (;;) {
    Thread* thread = self();
    Fiber* mine = thread->fiber;
    Thread* next = nullptr;
    std::string error;
    try {
      w.entry(w.argument);
      ++thread->inside;
      leave(*thread);
      next = pick();
    } catch (const std::exception& caught) {
      error = caught.what();
    }
    if (!error.empty()) abandon(w, *mine, std::move(error));
    thread->fiber = nullptr;
    if (next && !next->fiber) {
      next->fiber = mine;
      become(next);
      continue;
    }
    w.free_fibers.push_back(mine);
    go_on_with(*mine, next);
  }
}

void block_on(Waits waits, const void* object, uint64_t detail, Site site) {
  Thread* thread = self();
  thread->state = State::waiting;
  thread->waits = waits;
  thread->object = object;
  thread->detail = detail;
  thread->site = site;
  give_way();
}

void wake(Thread* thread) {
  ++worker->progress;
  enqueue(thread);
}

void poll(Site site) {
  Thread* thread = self();
  if (++thread->polls < polls_before_yield) return;
  Inside inside;
  thread->polls = 0;
  thread->state = State::polling;
  thread->site = site;
  worker->polling.push_back(thread);
  give_way();
}

void progressed() { ++worker->progress; }

// Where nothing else happens, time passes faster and faster: a wait for the clock ends before it looks like a deadlock.
uint64_t clock() {
  Worker& w = *worker;
  w.time_skipped += (1ull << std::min<uint64_t>(w.idle_rounds, 40)) - 1;
  return ++w.steps + w.time_skipped;
}

void abandon(Worker& w, Fiber& running, std::string error) {
  w.error = std::move(error);
  current = nullptr;
  Fiber::switch_to(running, w.main);
  __builtin_unreachable();
}

void take_stacks_back(Worker& w) {
  w.free_fibers.clear();
  for (auto& fiber : w.fibers) {
    fiber->rewind();
    w.free_fibers.push_back(fiber.get());
  }
}

void run_threads(Worker& w) {
  w.ready.clear();
  w.head = 0;
  w.polling.clear();
  w.progress = w.progress_seen = w.idle_rounds = 0;
  set_stuck(w, false);
  for (Thread& thread : w.gang.threads) enqueue(&thread);
  if (w.options.order == Order::random)
    for (size_t i = w.ready.size(); i > 1; --i) std::swap(w.ready[i - 1], w.ready[w.random() % i]);
  Thread* first = pick();
  w.interrupted = nullptr;
  {
    Watch watching(w);
    go_on_with(w.main, first);
  }
  if (w.interrupted) {
    char seconds[32];
    snprintf(seconds, sizeof seconds, "%g s", w.options.timeout_s);
    w.error = std::string("a thread has run for ") + seconds +
              " without reaching an instruction that lets others run: it spins on memory, or computes for longer than "
              "Options.timeout_s allows\n  by " + describe(*w.interrupted);
  }
  if (!w.error.empty()) take_stacks_back(w);  // threads were left in the middle
}

}  // namespace simt::model
