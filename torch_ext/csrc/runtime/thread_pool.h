/// Threads that run the tasks of one call together. Knows nothing of torch or OpenMP.
#pragma once

#include <atomic>
#include <cstddef>
#include <string>
#include <vector>

namespace torch_ext {

/// A fixed number of threads, the caller's among them. Between calls the others wait for some tens of microseconds,
/// so that the next call finds them awake, and then sleep: an idle pool takes no CPU time.
///
/// The workers are named torch_ext-1, torch_ext-2 ... and block all signals but those that report a fault of the thread
/// itself, so that the process's handlers run on its own threads.
///
/// A child process that was forked from one with a pool has none of its threads; the first call there starts new
/// ones. What the parent's other threads did at that moment does not matter. Destroying the pool in the child leaks
/// what the parent's threads may have held.
class ThreadPool {
 public:
  using Task = void (*)(void* context, size_t i);

  struct Options {
    size_t threads = 1;          ///< the caller included
    std::vector<int> cpus = {};  ///< where workers may run; empty: where the thread that makes the pool may
    bool pin = false;            ///< worker i runs on cpus[i % cpus.size()] alone; the caller is never pinned
  };

  /// Starts the workers.
  ///
  /// Throws std::runtime_error if there are to be no threads or if the process may not run on one of the CPUs, and
  /// std::system_error if the system refuses a thread.
  explicit ThreadPool(const Options& options);
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  /// Joins the workers. No call of `parallel` may be in progress.
  ~ThreadPool();

  size_t threads() const { return options_.threads; }

  /// Runs task(context, i) for i in [0, tasks) and returns when all have run. The caller works too. Each thread takes
  /// the next i when it is free, in ascending order, so that a slow thread holds up only the task that it is in.
  ///
  /// Tasks must not throw: the program ends if one does. They must not fork, except for exec. A task may call
  /// `parallel` of any pool: its thread runs those tasks alone. So does the caller if there is one task or one
  /// thread. Several threads may call at once: they take turns.
  ///
  /// Throws std::runtime_error for 2^31 tasks or more; std::system_error in a forked child whose threads cannot be
  /// started.
  void parallel(size_t tasks, Task task, void* context);

  /// Runs `errand` once on each thread: on the caller's before this returns, on a worker as soon as it has nothing else
  /// to do. If this is called again before that, the worker runs the newer one alone. In a task, and in a forked child
  /// that has no threads yet, only the caller runs it. It must not throw.
  void on_each_thread(void (*errand)());

 private:
  struct Team;

  Team* team();

  const Options options_;
  std::atomic<Team*> team_;
};

/// How many threads can run at once in this process: the CPUs that it may run on, or what the CPU quotas of its
/// control groups (v1 and v2) allow, rounded down, if that is less; at least 1. `Machine.usable_cpus` of
/// torch_ext/machine.py is the same rule.
size_t default_threads();

/// The same for a process that may run on `affinity` CPUs and whose /proc and /sys are below `root`, such as "" or
/// "/tmp/x".
size_t default_threads(const std::string& root, size_t affinity);

}  // namespace torch_ext
