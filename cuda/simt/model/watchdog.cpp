// A kernel that spins without ever calling the model would hang the process: nobody else runs. One thread looks at the
// workers; where the scheduler has not moved for Options.timeout_s, it interrupts the kernel by a signal, whose handler
// leaves the fiber for good. It never interrupts inside the model, whose state must stay whole.
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <mutex>
#include <thread>

#include "state.h"

namespace simt::model {

namespace {

struct Watched {
  Worker* worker;
  pthread_t thread;
  uint64_t steps;
  std::chrono::steady_clock::time_point since;
};

std::mutex mutex;
auto& watched = *new std::vector<Watched>;
pid_t running_in = 0;  // a forked child has no such thread
volatile sig_atomic_t asked = 0;

void interrupt(int) {
  Worker* w = worker;
  if (!asked || !w || !current || current->inside) return;
  asked = 0;
  abandon(*w, *self()->fiber,
          "a thread has run for " + std::to_string(w->options.timeout_s) +
              " s without reaching an instruction that lets others run: it spins on memory\n  by " + describe(*self()));
}

void look() {
  for (;;) {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    std::lock_guard lock(mutex);
    const auto now = std::chrono::steady_clock::now();
    for (Watched& one : watched) {
      const uint64_t steps = __atomic_load_n(&one.worker->steps, __ATOMIC_RELAXED);
      if (steps != one.steps) {
        one.steps = steps;
        one.since = now;
      } else if (std::chrono::duration<double>(now - one.since).count() > one.worker->options.timeout_s) {
        asked = 1;
        pthread_kill(one.thread, SIGURG);
      }
    }
  }
}

}  // namespace

void watch(Worker& w) {
  std::lock_guard lock(mutex);
  if (running_in != getpid()) {
    running_in = getpid();
    watched.clear();
    struct sigaction action = {};
    action.sa_handler = interrupt;
    action.sa_flags = SA_NODEFER | SA_RESTART;  // the handler may not return
    sigaction(SIGURG, &action, nullptr);
    std::thread(look).detach();
  }
  watched.push_back({&w, pthread_self(), w.steps, std::chrono::steady_clock::now()});
}

void unwatch(Worker& w) {
  std::lock_guard lock(mutex);
  for (size_t i = 0; i < watched.size(); ++i)
    if (watched[i].worker == &w) watched.erase(watched.begin() + long(i));
}

}  // namespace simt::model
