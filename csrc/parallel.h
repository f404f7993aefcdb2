// Threads: the only file pair (with parallel.cc) that knows about them.
#ifndef SEPCONV_PARALLEL_H_
#define SEPCONV_PARALLEL_H_

#include <cstdint>
#include <type_traits>

namespace sepconv {

namespace internal {
using TaskPointer = void (*)(void* context, int64_t task, int64_t worker);
void RunTasks(int64_t num_tasks, int64_t num_threads, TaskPointer task, void* context);
}  // namespace internal

// Calls body(task, worker) for every task in [0, num_tasks), worker in [0, num_threads), and
// returns when all are done. Which worker runs a task is not fixed, so a body must not let its
// result depend on `worker`. `body` must not throw.
template <typename Body>
void ParallelFor(int64_t num_tasks, int64_t num_threads, Body&& body) {
  if (num_threads <= 1 || num_tasks <= 1) {
    for (int64_t task = 0; task < num_tasks; ++task) body(task, int64_t{0});
    return;
  }
  using BodyType = std::remove_reference_t<Body>;
  internal::RunTasks(
      num_tasks, num_threads,
      [](void* context, int64_t task, int64_t worker) {
        (*static_cast<BodyType*>(context))(task, worker);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Of a task that wrote past the caches, at its end: whoever hears that the task is done sees what
// it wrote.
void StreamsArrive();

}  // namespace sepconv

#endif  // SEPCONV_PARALLEL_H_
