#include "parallel.h"

#include <pthread.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>

#include "float_mode.h"
#include "sepconv.h"
#include "tuning.h"

namespace sepconv {
namespace {

// A waiting thread spins this long before it sleeps: about the price of a wake-up (20 microseconds
// on Zen 5, 80 on a Xeon with AMX, both virtual), so that back-to-back calls of a network do not
// pay for it, and an idle process does not burn a core. Twice as long takes the CPU from threads
// that a framework runs between our calls.
constexpr auto kSpinTime = std::chrono::microseconds(60);

void Relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <typename Condition>
bool SpinUntil(Condition condition) {
  const auto end = std::chrono::steady_clock::now() + kSpinTime;
  do {
    for (int i = 0; i < 64; ++i) {
      if (condition()) return true;
      Relax();
    }
  } while (std::chrono::steady_clock::now() < end);
  return condition();
}

struct Job {
  internal::TaskPointer task;
  void* context;
  int64_t num_tasks;
  int64_t helpers;  // workers 1 ... helpers take part
};

// What is known of one who works at a job: the caller is number 0.
struct alignas(kCacheLineBytes) Seat {
  std::atomic<int64_t> taken{0};  // of its run of tasks, by whomever
  std::atomic<int> cpu{-1};       // where the worker ended its last job
  std::thread::native_handle_type thread{};
};

class Pool {
 public:
  // One job at a time. A second caller, or a task that calls again, does its work alone.
  void Run(const Job& wanted) {
    std::unique_lock<std::mutex> only_one(busy_, std::try_to_lock);
    if (!only_one.owns_lock()) return RunAlone(wanted);
    Job job = wanted;
    job.helpers = StartWorkers(wanted.helpers);
    if (job.helpers == 0) return RunAlone(job);
    LeaveCallersCpu(job.helpers);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = job;
      for (int64_t i = 0; i <= job.helpers; ++i)
        seats_[i].taken.store(0, std::memory_order_relaxed);
      unfinished_.store(job.helpers, std::memory_order_relaxed);
      generation_.fetch_add(1, std::memory_order_release);
    }
    start_.notify_all();
    TakeTasks(job, 0);
    const auto finished = [this] { return unfinished_.load(std::memory_order_acquire) == 0; };
    if (!SpinUntil(finished)) {
      std::unique_lock<std::mutex> lock(mutex_);
      done_.wait(lock, finished);
    }
  }

 private:
  static void RunAlone(const Job& job) {
    for (int64_t task = 0; task < job.num_tasks; ++task) job.task(job.context, task, 0);
  }

  // Everyone has a run of neighbouring tasks, so that what they share stays in one cache, and then
  // helps the others with theirs.
  void TakeTasks(const Job& job, int64_t worker) {
    const int64_t workers = job.helpers + 1;
    for (int64_t i = 0; i < workers; ++i) {
      const int64_t owner = (worker + i) % workers;
      const int64_t begin = job.num_tasks * owner / workers;
      const int64_t end = job.num_tasks * (owner + 1) / workers;
      std::atomic<int64_t>& taken = seats_[owner].taken;
      while (taken.load(std::memory_order_relaxed) < end - begin) {
        const int64_t task = begin + taken.fetch_add(1, std::memory_order_relaxed);
        if (task < end) job.task(job.context, task, worker);
      }
    }
  }

  // Returns how many of the `wanted` workers exist.
  int64_t StartWorkers(int64_t wanted) {
    while (num_workers_ < wanted) {
      const int64_t worker = num_workers_ + 1;
      try {
        if (static_cast<int64_t>(seats_.size()) == worker) seats_.emplace_back();
        std::thread thread(&Pool::WorkerLoop, this, &seats_[worker], worker, generation_.load());
        seats_[worker].thread = thread.native_handle();
        thread.detach();
      } catch (const std::exception&) {
        break;  // the system gives no more threads or memory: work with those there are
      }
      num_workers_ = worker;
    }
    return std::min(wanted, num_workers_);
  }

  // The scheduler may wake a worker on the CPU that the caller keeps busy, and again and again,
  // because on machines with few CPUs it hardly looks for an idle one. A worker that was found
  // there is sent to the other CPUs.
  void LeaveCallersCpu(int64_t helpers) {
#if defined(__linux__)
    const int here = sched_getcpu();
    for (int64_t worker = 1; worker <= helpers; ++worker) {
      if (here < 0 || seats_[worker].cpu.load(std::memory_order_relaxed) != here) continue;
      cpu_set_t others;
      if (sched_getaffinity(0, sizeof(others), &others) != 0) return;
      CPU_CLR(here, &others);
      if (CPU_COUNT(&others) == 0) return;
      pthread_setaffinity_np(seats_[worker].thread, sizeof(others), &others);
    }
#endif
  }

  void WorkerLoop(Seat* seat, int64_t worker, uint64_t seen) {
    const IeeeMode mode;
    for (;;) {
      const auto started = [&] { return generation_.load(std::memory_order_acquire) != seen; };
      SpinUntil(started);
      Job job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        start_.wait(lock, started);
        seen = generation_.load(std::memory_order_relaxed);
        job = job_;
      }
      if (worker > job.helpers) continue;
      TakeTasks(job, worker);
#if defined(__linux__)
      seat->cpu.store(sched_getcpu(), std::memory_order_relaxed);
#endif
      if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        std::lock_guard<std::mutex> lock(mutex_);
        done_.notify_one();
      }
    }
  }

  std::mutex busy_;
  std::mutex mutex_;
  std::condition_variable start_, done_;
  Job job_{};
  std::atomic<uint64_t> generation_{0};
  std::atomic<int64_t> unfinished_{0};
  std::deque<Seat> seats_{1};  // The caller's, then the workers'. A deque moves none when it grows.
  int64_t num_workers_ = 0;
};

// Never destroyed: its threads may outlive every static object, and sleep when the process ends.
std::atomic<Pool*> pool{new Pool};

// A forked child has none of the threads, and may have inherited locked mutexes: it starts with a
// pool of its own.
[[maybe_unused]] const int registered =
    pthread_atfork(nullptr, nullptr, [] { pool.store(new Pool); });

int64_t CpusOfThisProcess() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

std::atomic<int64_t> chosen_num_threads{0};

}  // namespace

namespace internal {
void RunTasks(int64_t num_tasks, int64_t num_threads, TaskPointer task, void* context) {
  pool.load()->Run({task, context, num_tasks, std::min(num_threads, num_tasks) - 1});
}
}  // namespace internal

void StreamsArrive() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

void SetNumThreads(int64_t num_threads) { chosen_num_threads = std::max<int64_t>(0, num_threads); }

int64_t GetNumThreads() {
  const int64_t chosen = chosen_num_threads;
  if (chosen > 0) return chosen;
  static const int64_t from_environment = [] {
    const char* text = std::getenv("OMP_NUM_THREADS");  // "4" or, by nesting level, "4,2"
    return text ? std::max<int64_t>(0, std::strtoll(text, nullptr, 10)) : 0;
  }();
  return from_environment > 0 ? from_environment : CpusOfThisProcess();
}

}  // namespace sepconv
