// What the model knows while a grid runs. A Worker (OS thread) runs one Gang of blocks at a time: a cluster, or all
// blocks of a grid whose blocks wait for each other. Every CUDA thread is a Thread with a fiber once it has started.
#pragma once
#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "../cpu/model.h"
#include "async.h"
#include "check.h"
#include "fiber.h"

namespace simt::model {

struct Cta;
struct Gang;

enum class State : uint8_t { ready, running, waiting, polling, done };
enum class Waits : uint8_t { nothing, barrier, cluster, warp, mbarrier, wgmma, registers };

struct Thread : ThreadContext {
  Cta* cta = nullptr;
  Fiber* fiber = nullptr;
  State state = State::ready;
  Waits waits = Waits::nothing;
  const void* object = nullptr;  // what it waits on
  uint64_t detail = 0;           // barrier id, parity, lane mask, wgmma number, registers
  Site site{"?", 0};             // where
  unsigned index = 0;            // in the gang
  unsigned polls = 0;            // since it last let others run
  bool cluster_arrived = false;  // between cluster_arrive and cluster_wait
  uint64_t cluster_phase = 0;    // that it arrived in
  uint64_t aligned = 0;          // .aligned instructions it has executed
  ThreadAsync async;
};

struct Barrier {
  int arrived = 0, expected = 0;  // threads; expected 0: all that have not exited
  std::vector<Thread*> waiting;
  const Thread* last = nullptr;  // to arrive, here:
  Site last_site{"?", 0};
  check::SyncClock clock;
};

struct Collective {  // a warp operation that some lanes have reached
  unsigned mask, arrived;
  WarpOp kind;
  Site site;
  void* payload[32];
  Thread* lane[32];
  check::SyncClock clock;
};

struct Aligned {  // an .aligned instruction that some lanes of a warp have executed
  Site site;
  unsigned lanes;
};

struct Warp {
  std::vector<Collective> open;
  std::deque<Aligned> aligned;  // until all lanes have
  uint64_t first_aligned = 0;   // the number of the first of these
  unsigned exited = 0;          // lanes
  unsigned registers_set = 0;   // setmaxnreg so far, the last one here:
  Site registers_site{"?", 0};
  int registers = 0;   // per thread
  int rank = 0;        // Order::priority
  std::vector<Thread*> ready;  // Order::priority
};

struct Cluster {
  std::vector<Cta*> blocks;
  unsigned arrived = 0;
  std::vector<Thread*> waiting;
  uint64_t phase = 0;
  check::SyncClock clock, done;  // the arrivals of this phase; of the one before
};

struct Cta {
  uint3 index;
  unsigned rank = 0;  // in its cluster
  Cluster* cluster = nullptr;
  Gang* gang = nullptr;
  Thread* threads = nullptr;
  unsigned count = 0, alive = 0;
  // Two views of shared memory: what threads read and write, and what TMA and wgmma (the async proxy) do. A
  // fence.proxy.async copies the first to the second; what the async proxy writes appears in both.
  char *shared = nullptr, *shared_async = nullptr;
  size_t shared_bytes = 0;
  Barrier barriers[16];
  std::vector<Warp> warps;
  int free_registers = 0;
  CtaAsync async;

  bool contains(const void* pointer) const {
    return static_cast<const char*>(pointer) >= shared && static_cast<const char*>(pointer) < shared + shared_bytes;
  }
};

// Shared-memory addresses start here, as on the hardware, where the first KiB belongs to the system.
constexpr uint32_t shared_window = 1024;

struct Gang {
  std::vector<std::unique_ptr<Cta>> blocks;
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<Thread> threads;
  unsigned alive = 0;
  uint64_t index = 0;  // of the gang in the grid
  std::vector<Thread*> mbarrier_waiting;
  GangAsync async;
};

struct Worker {
  Options options;
  Gang gang;
  Fiber main;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> free_fibers;
  std::vector<Thread*> ready;  // from `head` on; not for Order::priority
  size_t head = 0;
  std::vector<Thread*> polling;
  uint64_t progress = 0, progress_seen = 0, idle_rounds = 0, steps = 0;
  uint64_t time_skipped = 0;  // by kernels that wait for the clock
  std::atomic<int>* going = nullptr;  // workers of the grid that are not stuck
  bool alone = true;                  // no other worker runs this grid
  bool stuck = false;                 // all its threads wait for what another worker's block may do
  char* arena = nullptr;  // shared memory of the gang's blocks
  size_t arena_bytes = 0;
  uint64_t random_state = 1;
  std::string error;
  void (*entry)(void*) = nullptr;
  void* argument = nullptr;
  std::thread::id home;                // the OS thread that ran it last
  volatile bool interrupt = false;     // the watchdog asks to leave the kernel,
  Thread* volatile interrupted = nullptr;  // and this thread was running

  uint64_t random() {  // splitmix64
    uint64_t z = random_state += 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
};

extern __thread Worker* worker;
inline Thread* self() { return static_cast<Thread*>(current); }  // null outside of kernels

// Marks the running thread as inside the model, where the watchdog may not interrupt it.
struct Inside {
  ThreadContext* thread = current;
  Inside() { ++thread->inside; }
  ~Inside() { --thread->inside; }
};

// What OS threads share, in the order they are taken. fork() takes them all, so that the child finds them free.
struct Locks {
  std::mutex grid;  // of the checked build: clocks, shadow memory and counters belong to one launch at a time
  std::mutex watchdog, pool, atomics;
};
Locks& locks();  // launch.cpp

// ---- scheduler.cpp ----
void block_on(Waits waits, const void* object, uint64_t detail, Site site);  // parks the running thread, runs others
void wake(Thread* thread);
void run_threads(Worker& worker);  // the gang's, from the start to the end; a mistake leaves its report in `error`
void take_stacks_back(Worker& worker);  // of threads that will never go on
[[noreturn]] void abandon(Worker& worker, Fiber& running, std::string error);  // leaves the fiber for good

// ---- barrier.cpp ----
void aligned(Site site);  // the running thread executes an .aligned instruction: the lanes of its warp must do the same
constexpr const char* not_started_text = "may not have started: no cluster barrier has been passed";
void leave_barriers(Thread& thread);  // it has exited: barriers no longer wait for it
std::string barrier_leftover(const Cta& block);  // arrivals that nobody has waited for when a block ends; or empty

// ---- watchdog.cpp ----
struct Watch {  // as long as it lives: no step of the scheduler for Options.timeout_s interrupts the kernel
  explicit Watch(Worker& worker);
  ~Watch();
  Worker& worker;
};

// ---- report.cpp: all raise Error, with the running thread or the operation's place in the text ----
[[noreturn]] void fail(const std::string& message, Site site);
[[noreturn]] void fail_issued(const std::string& message, Site issued, const Cta& block);  // the culprit ran earlier
[[noreturn]] void deadlock(Worker& worker);
std::string describe(const Thread& thread);    // "thread 128 (warp 4) of block (0,0,0)"
std::string at(Site site);                     // "file.cu:12"
std::string where(const void* pointer);        // "smem+0x400" or "smem+0x400 of block (1,0,0)", else the address
std::string block_name(const Cta& block);      // "block (0,0,0)"

// ---- memory.cpp ----
Cta* owner(const void* pointer);  // the block whose shared memory holds the pointer; null if none
void publish(Cta& block);         // the generic view of shared memory becomes the async one

// ---- mbarrier.cpp ----
std::string mbarrier_text(const uint64_t* barrier);  // "phase 0, pending arrivals 1 of 2, tx-count 0"
void mbarrier_check(const uint64_t* barrier, Site site);  // initialised and aligned, or fail
void mbarrier_complete_transaction(uint64_t* barrier, uint32_t bytes, const check::Snapshot& by, Site issued);
void mbarrier_arrive_by(uint64_t* barrier, const check::Snapshot& by, Site issued);  // cp.async.mbarrier.arrive

}  // namespace simt::model
