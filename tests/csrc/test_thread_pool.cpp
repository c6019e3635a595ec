// The thread pool: every task once, whoever calls; forks, signals, CPU time of waiting; threads that a process should
// use.
#include "runtime/thread_pool.h"

#include <dirent.h>
#include <malloc.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "runner.h"

#if defined(TORCH_EXT_THREAD_SANITIZER)
// A child of a program with threads may start threads of its own.
extern "C" const char* __tsan_default_options() { return "die_after_fork=0"; }
#endif

namespace torch_ext::test {
namespace {

using std::chrono::milliseconds;

constexpr auto kLongest = std::chrono::seconds(20);  // for what takes microseconds

template <typename F>
void run(ThreadPool& pool, size_t tasks, const F& fn) {
  pool.parallel(
      tasks, [](void* context, size_t i) { (*static_cast<const F*>(context))(i); },
      const_cast<void*>(static_cast<const void*>(&fn)));
}

/// Waits until a condition holds; false if it takes far too long. Tests that would hang fail.
template <typename F>
bool comes_true(const F& condition) {
  const auto end = std::chrono::steady_clock::now() + kLongest;
  while (!condition()) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::yield();
  }
  return true;
}

/// Runs `body` in a forked child; the exit code that it returns, or what ended it. A child that hangs is ended.
template <typename F>
std::string in_child(const F& body) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    alarm(30);
    _exit(body());
  }
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) != child) return "no child";
  if (WIFSIGNALED(status)) return "signal " + std::to_string(WTERMSIG(status));
  return "exit code " + std::to_string(WEXITSTATUS(status));
}

/// 0 + 1 + ... of the indices that ran, each once, on all threads.
size_t sum_of_indices(ThreadPool& pool, size_t tasks) {
  std::atomic<size_t> sum{0};
  run(pool, tasks, [&](size_t i) { sum += i; });
  return sum;
}

size_t entries_of(const char* folder) {
  DIR* const dir = opendir(folder);
  if (!dir) return 0;
  size_t count = 0;
  while (readdir(dir)) ++count;
  closedir(dir);
  return count;
}

// ---- tasks ----------------------------------------------------------------------------------------------------------

TORCH_EXT_TEST(thread_pool_runs_every_index_once) {
  for (size_t i = 0; i < options().random; ++i) {
    const size_t threads = random_source().between(1, 6);
    ThreadPool pool({.threads = threads});
    EXPECT(pool.threads() == threads, "%zu threads, asked for %zu", pool.threads(), threads);
    for (size_t j = 0; j < 40; ++j) {
      const size_t tasks = random_source().below(j % 4 ? 20 : 2000);
      context("%zu threads, %zu tasks", threads, tasks);
      std::vector<std::atomic<uint32_t>> ran(tasks);
      run(pool, tasks, [&](size_t task) { ran[task].fetch_add(1, std::memory_order_relaxed); });
      for (size_t task = 0; task < tasks; ++task)
        EXPECT(ran[task] == 1, "task %zu ran %u times", task, ran[task].load());
    }
  }
}

// What tasks write without atomics is there afterwards, and what the caller wrote before is seen by them.
TORCH_EXT_TEST(thread_pool_publishes_what_is_written) {
  ThreadPool pool({.threads = 3});
  std::vector<size_t> in(17), out(17);
  for (size_t round = 0; round < (options().quick ? 300 : 3000); ++round) {
    for (size_t i = 0; i < in.size(); ++i) in[i] = round * i;
    run(pool, in.size(), [&](size_t i) { out[i] = in[i] + 1; });
    for (size_t i = 0; i < in.size(); ++i)
      EXPECT(out[i] == round * i + 1, "round %zu, task %zu: %zu", round, i, out[i]);
  }
}

TORCH_EXT_TEST(thread_pool_all_threads_work_at_once) {
  for (const size_t threads : {2, 3, 5}) {
    ThreadPool pool({.threads = threads});
    for (size_t round = 0; round < 20; ++round) {
      context("%zu threads, round %zu", threads, round);
      // Every other time they sleep.
      if (round % 2) std::this_thread::sleep_for(milliseconds(2));
      std::atomic<size_t> there{0};
      std::atomic<bool> all{true};
      run(pool, threads, [&](size_t) {
        ++there;
        if (!comes_true([&] { return there == threads; })) all = false;
      });
      EXPECT(all, "%zu threads came", there.load());
      if (!all) return;
    }
  }
}

TORCH_EXT_TEST(thread_pool_a_slow_task_holds_up_no_other) {
  constexpr size_t kTasks = 64;
  ThreadPool pool({.threads = 2});
  std::atomic<size_t> others{0};
  std::atomic<bool> all{true};
  run(pool, kTasks, [&](size_t i) {
    if (i > 0) {
      ++others;
    } else if (!comes_true([&] { return others == kTasks - 1; })) {
      all = false;
    }
  });
  EXPECT(all, "%zu of %zu tasks ran beside the first", others.load(), kTasks - 1);
}

TORCH_EXT_TEST(thread_pool_callers_take_turns) {
  ThreadPool pool({.threads = 3});
  const size_t rounds = options().quick ? 200 : 3000;
  std::atomic<size_t> wrong{0}, inside{0};
  const auto call = [&](size_t caller) {
    for (size_t round = 0; round < rounds; ++round) {
      const size_t tasks = 2 + (round + caller) % 30;
      std::atomic<size_t> sum{0};
      run(pool, tasks, [&](size_t i) {
        // Tasks of two callers never run at once: the upper half counts those of others.
        const size_t mine = size_t{1} << (16 * caller);
        if ((inside.fetch_add(mine) & ~(size_t{0xffff} << (16 * caller))) != 0) ++wrong;
        sum += i;
        inside -= mine;
      });
      if (sum != tasks * (tasks - 1) / 2) ++wrong;
    }
  };
  std::thread second(call, 1), third(call, 2);
  call(0);
  second.join();
  third.join();
  EXPECT(wrong == 0, "%zu of %zu calls were wrong", wrong.load(), 3 * rounds);
}

TORCH_EXT_TEST(thread_pool_nested_calls_run_on_their_thread) {
  ThreadPool pool({.threads = 3}), other({.threads = 2});
  std::atomic<size_t> ran{0}, elsewhere{0};
  run(pool, 8, [&](size_t) {
    const std::thread::id self = std::this_thread::get_id();
    for (ThreadPool* const inner : {&pool, &other}) {
      run(*inner, 10, [&](size_t) {
        ++ran;
        if (std::this_thread::get_id() != self) ++elsewhere;
        run(*inner, 2, [&](size_t) { ++ran; });
      });
    }
  });
  EXPECT(ran == 8 * 2 * 30, "%zu of 480 ran", ran.load());
  EXPECT(elsewhere == 0, "%zu ran on other threads", elsewhere.load());
  EXPECT(sum_of_indices(pool, 100) == 4950, "the pool works afterwards");
}

std::atomic<size_t> g_errands{0};
thread_local size_t t_errands = 0;

void errand() {
  ++t_errands;
  ++g_errands;
}

TORCH_EXT_TEST(thread_pool_errands_run_once_on_each_thread) {
  for (const size_t threads : {1, 2, 5}) {
    ThreadPool pool({.threads = threads});
    t_errands = 0;
    for (size_t round = 1; round <= 20; ++round) {
      context("%zu threads, round %zu", threads, round);
      // Every other time they sleep.
      if (round % 2) std::this_thread::sleep_for(milliseconds(2));
      g_errands = 0;
      pool.on_each_thread(errand);
      EXPECT(comes_true([&] { return g_errands >= threads; }), "%zu ran", g_errands.load());
      std::atomic<size_t> there{0}, wrong{0};
      run(pool, threads, [&](size_t) {
        ++there;
        if (!comes_true([&] { return there == threads; }) || t_errands != round) ++wrong;
      });
      EXPECT(wrong == 0 && g_errands == threads, "%zu errands, %zu threads with too many or few", g_errands.load(),
             wrong.load());
    }
  }
  // Beside jobs of other threads, and in a task.
  ThreadPool pool({.threads = 3});
  const size_t rounds = options().quick ? 100 : 1000;
  std::atomic<size_t> wrong{0};
  std::thread second([&] {
    for (size_t round = 0; round < rounds; ++round) wrong += sum_of_indices(pool, 100) != 4950;
  });
  for (size_t round = 0; round < rounds; ++round) pool.on_each_thread(errand);
  second.join();
  EXPECT(wrong == 0, "%zu of %zu calls were wrong", wrong.load(), rounds);
  g_errands = 0;
  run(pool, 2, [&](size_t) { pool.on_each_thread(errand); });
  EXPECT(comes_true([&] { return g_errands >= 2; }), "%zu ran in tasks", g_errands.load());
  const std::string child = in_child([&] {
    g_errands = 0;
    pool.on_each_thread(errand);
    return g_errands == 1 && sum_of_indices(pool, 100) == 4950 ? 0 : 1;
  });
  EXPECT(child == "exit code 0", "the child: %s", child.c_str());
}

TORCH_EXT_TEST(thread_pool_one_task_or_thread_is_the_callers) {
  const std::thread::id self = std::this_thread::get_id();
  ThreadPool alone({.threads = 1}), pool({.threads = 3});
  size_t ran = 0;
  const auto on_caller = [&](size_t i) {
    EXPECT(std::this_thread::get_id() == self, "task %zu is on another thread", i);
    ++ran;
  };
  run(alone, 5, on_caller);
  run(pool, 1, on_caller);
  run(pool, 0, on_caller);
  EXPECT(ran == 6, "%zu of 6 tasks ran", ran);
}

// Jobs so short that workers come late to most of them: none may take a task of the next job for one of its own.
TORCH_EXT_TEST(thread_pool_late_workers_take_nothing) {
  struct Job {
    size_t number, tasks;
    std::atomic<size_t> ran{0}, sum{0}, wrong{0};
  };
  static std::atomic<size_t> current;
  const auto odd = [](void* context, size_t i) {
    Job& job = *static_cast<Job*>(context);
    if (job.number % 2 != 1 || job.number != current || i >= job.tasks) ++job.wrong;
    ++job.ran;
    job.sum += i;
  };
  const auto even = [](void* context, size_t i) {
    Job& job = *static_cast<Job*>(context);
    if (job.number % 2 != 0 || job.number != current || i >= job.tasks) ++job.wrong;
    ++job.ran;
    job.sum += i;
  };
  for (const size_t threads : {2, 4}) {
    ThreadPool pool({.threads = threads});
    const size_t jobs = options().quick ? 5000 : 100000;
    for (size_t number = 0; number < jobs; ++number) {
      Job job{.number = number, .tasks = 2 + number % 3};
      current = number;
      if (number % 2) {
        pool.parallel(job.tasks, odd, &job);
      } else {
        pool.parallel(job.tasks, even, &job);
      }
      EXPECT(job.ran == job.tasks && job.sum == job.tasks * (job.tasks - 1) / 2 && job.wrong == 0,
             "job %zu of %zu tasks on %zu threads: %zu ran, %zu wrong", number, job.tasks, threads, job.ran.load(),
             job.wrong.load());
    }
  }
}

TORCH_EXT_TEST(thread_pool_refuses_too_many_tasks) {
  ThreadPool pool({.threads = 2});
  try {
    run(pool, size_t{1} << 31, [](size_t) {});
    EXPECT(false, "no error");
  } catch (const std::runtime_error& error) {
    EXPECT(std::strstr(error.what(), "got 2147483648"), "the message is: %s", error.what());
  }
  EXPECT(sum_of_indices(pool, 100) == 4950, "the pool works afterwards");
}

// ---- threads --------------------------------------------------------------------------------------------------------

std::vector<int> cpus_of_this_thread() {
  cpu_set_t set;
  CPU_ZERO(&set);
  std::vector<int> cpus;
  if (sched_getaffinity(0, sizeof set, &set) != 0) return cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  }
  return cpus;
}

/// What a thread of a pool is like.
struct Seen {
  std::string name;
  std::vector<int> cpus;
  bool blocks_signals = false, blocks_faults = false;
};

Seen look() {
  Seen seen;
  char name[17] = {};
  prctl(PR_GET_NAME, name, 0, 0, 0);
  seen.name = name;
  seen.cpus = cpus_of_this_thread();
  sigset_t blocked;
  sigprocmask(SIG_SETMASK, nullptr, &blocked);
  seen.blocks_signals =
      sigismember(&blocked, SIGTERM) && sigismember(&blocked, SIGINT) && sigismember(&blocked, SIGCHLD);
  seen.blocks_faults = sigismember(&blocked, SIGSEGV);
  return seen;
}

/// All threads of a pool, the workers by their names.
std::vector<Seen> look_at(ThreadPool& pool) {
  std::vector<Seen> seen(pool.threads());
  std::atomic<size_t> there{0};
  run(pool, seen.size(), [&](size_t i) {
    seen[i] = look();
    ++there;
    comes_true([&] { return there == seen.size(); });
  });
  std::sort(seen.begin(), seen.end(), [](const Seen& a, const Seen& b) { return a.name < b.name; });
  return seen;
}

TORCH_EXT_TEST(thread_pool_workers_are_named_and_block_signals) {
  const Seen before = look();
  ThreadPool pool({.threads = 3});
  const Seen after = look();
  EXPECT(after.blocks_signals == before.blocks_signals && after.cpus == before.cpus, "the caller is as it was");
  size_t workers = 0;
  for (const Seen& seen : look_at(pool)) {
    if (seen.name == before.name) continue;
    ++workers;
    EXPECT(seen.name == "torch_ext-" + std::to_string(workers), "worker %zu has the name %s", workers,
           seen.name.c_str());
    EXPECT(seen.blocks_signals && !seen.blocks_faults, "%s has another signal mask", seen.name.c_str());
    EXPECT(seen.cpus == before.cpus, "%s runs on other CPUs", seen.name.c_str());
  }
  EXPECT(workers == 2, "%zu workers", workers);
}

TORCH_EXT_TEST(thread_pool_workers_stay_on_their_cpus) {
  const std::vector<int> all = cpus_of_this_thread();
  for (const bool pin : {false, true}) {
    for (const bool given : {false, true}) {
      context("pin %d, given %d", pin, given);
      // In descending order, so that the order counts; one of them only if they are not pinned.
      std::vector<int> cpus(all.rbegin(), all.rend());
      if (given && !pin) cpus.resize(1);
      ThreadPool pool({.threads = 4, .cpus = given ? cpus : std::vector<int>{}, .pin = pin});
      EXPECT(cpus_of_this_thread() == all, "the caller was moved");
      size_t worker = 0;
      for (const Seen& seen : look_at(pool)) {
        if (seen.name.rfind("torch_ext-", 0) != 0) continue;
        ++worker;
        const std::vector<int>& list = given ? cpus : all;
        std::vector<int> expected = list;
        if (pin) expected = {list[worker % list.size()]};
        EXPECT(seen.cpus == expected, "%s runs on %zu CPUs, the first is %d; expected %zu, %d", seen.name.c_str(),
               seen.cpus.size(), seen.cpus.empty() ? -1 : seen.cpus[0], expected.size(), expected[0]);
      }
      EXPECT(worker == 3, "%zu workers", worker);
    }
  }
}

TORCH_EXT_TEST(thread_pool_refuses_what_cannot_be) {
  const std::vector<int> all = cpus_of_this_thread();
  const auto refused = [&](const ThreadPool::Options& wrong, const char* message) {
    context("%s", message);
    try {
      ThreadPool pool(wrong);
      EXPECT(false, "no error");
    } catch (const std::runtime_error& error) {
      EXPECT(std::strstr(error.what(), message), "the message is: %s", error.what());
    }
    EXPECT(cpus_of_this_thread() == all, "the caller was moved");
  };
  refused({.threads = 0}, "expected at least 1 thread, got 0");
  refused({.threads = 2, .cpus = {all[0], 100000}}, ",100000; this thread may run on");
  refused({.threads = 1, .cpus = {-1}}, "got -1;");
  refused({.threads = 2, .cpus = {1 << 30}, .pin = true}, "expected CPUs that this process may run on");
}

#if !defined(__SANITIZE_ADDRESS__) && !defined(TORCH_EXT_THREAD_SANITIZER)
// The limit counts threads of the user, and root has none: as another user, in a child.
TORCH_EXT_TEST(thread_pool_says_that_no_thread_can_be_started) {
  if (geteuid() != 0) return;
  const std::string outcome = in_child([] {
    const rlimit few = {1, 1};
    if (setresgid(65534, 65534, 65534) != 0 || setresuid(65534, 65534, 65534) != 0) return 0;
    if (setrlimit(RLIMIT_NPROC, &few) != 0) return 2;
    try {
      ThreadPool pool({.threads = 40});
      return 3;
    } catch (const std::system_error& error) {
      return std::strstr(error.what(), "of 40: ask for fewer") ? 0 : 4;
    }
  });
  EXPECT(outcome == "exit code 0", "%s", outcome.c_str());
}
#endif

TORCH_EXT_TEST(thread_pool_waits_without_cpu_time) {
  const auto cpu_time = [] {
    rusage use;
    getrusage(RUSAGE_SELF, &use);
    return std::chrono::seconds(use.ru_utime.tv_sec + use.ru_stime.tv_sec) +
           std::chrono::microseconds(use.ru_utime.tv_usec + use.ru_stime.tv_usec);
  };
  for (const size_t threads : {2, 4}) {
    ThreadPool pool({.threads = threads});
    sum_of_indices(pool, 100);
    const auto before = cpu_time();
    std::this_thread::sleep_for(milliseconds(300));
    const auto used = std::chrono::duration_cast<std::chrono::microseconds>(cpu_time() - before);
    note("%zu threads: %ld us of CPU time in 300 ms", threads, static_cast<long>(used.count()));
    EXPECT(used < milliseconds(60), "%zu threads used %ld us in 300 ms", threads, static_cast<long>(used.count()));
  }
}

/// Bytes on the heap; 0 if the C library does not tell.
size_t heap_bytes() {
#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && !defined(TORCH_EXT_THREAD_SANITIZER)
#if __GLIBC_PREREQ(2, 33)
  return mallinfo2().uordblks;
#endif
#endif
  return 0;
}

TORCH_EXT_TEST(thread_pool_200_pools_leak_nothing) {
  const auto cycle = [] {
    ThreadPool pool({.threads = 4});
    EXPECT(sum_of_indices(pool, 10) == 45, "sums are right");
  };
  for (size_t i = 0; i < 5; ++i) cycle();
  const size_t threads = entries_of("/proc/self/task"), files = entries_of("/proc/self/fd"), heap = heap_bytes();
  for (size_t i = 0; i < (options().quick ? 40 : 200); ++i) cycle();
  // A thread that was joined is in /proc for a moment more.
  EXPECT(comes_true([&] { return entries_of("/proc/self/task") <= threads; }), "%zu threads, before there were %zu",
         entries_of("/proc/self/task"), threads);
  EXPECT(entries_of("/proc/self/fd") == files, "%zu files, before there were %zu", entries_of("/proc/self/fd"), files);
  // A pool has more bytes than 300; allocators keep some of their own.
  EXPECT(heap_bytes() <= heap + 40 * 200, "%zu bytes on the heap, before there were %zu", heap_bytes(), heap);
}

// ---- fork -----------------------------------------------------------------------------------------------------------

// The sanitizer of GCC 12 takes a thread of a child for the parent's that had the same stack ("dup thread with used
// id"), and ends the child. Clang's follows.
#if !defined(__SANITIZE_THREAD__)

TORCH_EXT_TEST(thread_pool_works_in_a_forked_child) {
  auto pool = std::make_unique<ThreadPool>(ThreadPool::Options{.threads = 3});
  EXPECT(sum_of_indices(*pool, 1000) == 499500, "sums are right before");
  std::string outcome = in_child([&] {
    if (sum_of_indices(*pool, 1000) != 499500) return 2;
    if (look_at(*pool).size() != 3) return 3;  // hangs if there are fewer threads
    // A child of the child, and a pool of its own.
    const std::string below = in_child([&] {
      ThreadPool own({.threads = 2});
      return sum_of_indices(*pool, 1000) == 499500 && sum_of_indices(own, 10) == 45 ? 0 : 5;
    });
    if (below != "exit code 0") return 4;
    pool.reset();
    return 0;
  });
  EXPECT(outcome == "exit code 0", "%s", outcome.c_str());
  outcome = in_child([&] {
    pool.reset();  // unused in the child: no thread to join
    return 0;
  });
  EXPECT(outcome == "exit code 0", "destroyed in the child: %s", outcome.c_str());
  EXPECT(sum_of_indices(*pool, 1000) == 499500, "sums are right in the parent");
}

TORCH_EXT_TEST(thread_pool_works_in_a_child_of_a_busy_parent) {
  for (size_t round = 0; round < 5; ++round) {
    ThreadPool pool({.threads = 3});
    std::atomic<bool> inside{false}, leave{false};
    std::thread caller([&] {
      run(pool, 3, [&](size_t) {
        inside = true;
        comes_true([&] { return leave.load(); });
      });
    });
    EXPECT(comes_true([&] { return inside.load(); }), "the tasks have begun");
    const std::string outcome = in_child([&] {
      // Several threads find out at once that there are none.
      std::atomic<size_t> right{0};
      const auto call = [&] { right += sum_of_indices(pool, 100) == 4950; };
      std::thread second(call), third(call);
      call();
      second.join();
      third.join();
      return right == 3 && sum_of_indices(pool, 1000) == 499500 ? 0 : 2;
    });
    EXPECT(outcome == "exit code 0", "round %zu: %s", round, outcome.c_str());
    leave = true;
    caller.join();
    EXPECT(sum_of_indices(pool, 1000) == 499500, "sums are right in the parent");
  }
}

TORCH_EXT_TEST(thread_pool_forks_at_any_moment) {
  ThreadPool pool({.threads = 3});
  std::atomic<bool> leave{false};
  std::thread caller([&] {
    while (!leave) sum_of_indices(pool, 4);
  });
  for (size_t round = 0; round < (options().quick ? 5 : 50); ++round) {
    const std::string outcome = in_child([&] { return sum_of_indices(pool, 100) == 4950 ? 0 : 2; });
    EXPECT(outcome == "exit code 0", "round %zu: %s", round, outcome.c_str());
  }
  leave = true;
  caller.join();
}

#endif

// ---- CPUs of a process ----------------------------------------------------------------------------------------------

struct Files {
  const char* what;
  std::vector<std::pair<std::string, std::string>> files;
  size_t affinity, threads;
};

/// A folder with these files, which goes when it does.
class Root {
 public:
  explicit Root(const std::vector<std::pair<std::string, std::string>>& files) {
    const char* const temporary = std::getenv("TMPDIR");
    path_ = std::string(temporary ? temporary : "/tmp") + "/torch_ext-pool-XXXXXX";
    if (!mkdtemp(path_.data())) throw std::runtime_error("mkdtemp fails for " + path_);
    for (const auto& [name, content] : files) {
      for (size_t at = 0; (at = name.find('/', at)) != std::string::npos; ++at) {
        const std::string folder = path_ + "/" + name.substr(0, at);
        if (mkdir(folder.c_str(), 0700) == 0) made_.push_back(folder);
      }
      const std::string file = path_ + "/" + name;
      std::FILE* const out = std::fopen(file.c_str(), "w");
      if (!out) throw std::runtime_error("cannot write " + file);
      std::fputs(content.c_str(), out);
      std::fclose(out);
      made_.push_back(file);
    }
  }
  Root(const Root&) = delete;
  ~Root() {
    for (; !made_.empty(); made_.pop_back()) std::remove(made_.back().c_str());
    rmdir(path_.c_str());
  }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  std::vector<std::string> made_;  // folders before what is in them
};

std::string mounted_v2(const std::string& root, const std::string& point) {
  return "30 23 0:26 " + root + " " + point + " rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
}

const char* const kMountedV1 =
    "35 25 0:30 /docker/1 /sys/fs/cgroup/memory ro,nosuid master:15 - cgroup cgroup rw,memory\n"
    "36 25 0:31 /docker/1 /sys/fs/cgroup/cpu,cpuacct ro,nosuid master:16 - cgroup cgroup rw,cpu,cpuacct\n";

// The cases of tests/ops/test_doctor.py: torch_ext/machine.py has the same rule.
TORCH_EXT_TEST(default_threads_follow_affinity_and_quotas) {
  const std::string v2 = "sys/fs/cgroup/cpu.max", v1 = "sys/fs/cgroup/cpu,cpuacct/";
  const std::string group = "proc/self/cgroup", mounts = "proc/self/mountinfo";
  const Files cases[] = {
      {"no files", {}, 3, 3},
      {"no CPU", {}, 0, 1},
      {"half a CPU", {{group, "0::/\n"}, {v2, "50000 100000"}}, 8, 1},
      {"rounded down", {{group, "0::/\n"}, {v2, "299999 100000\n"}}, 8, 2},
      {"affinity is less", {{group, "0::/\n"}, {v2, "900000 100000\n"}}, 4, 4},
      {"no limit", {{group, "0::/\n"}, {v2, "max 100000\n"}}, 6, 6},
      {"v1, without mountinfo",
       {{group, "4:cpu,cpuacct:/docker/1\n"},
        {v1 + "cpu.cfs_quota_us", "250000\n"},
        {v1 + "cpu.cfs_period_us", "100000\n"}},
       6,
       2},
      {"v1, without limit",
       {{group, "4:cpu,cpuacct:/docker/1\n"},
        {"sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1"},
        {"sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000"}},
       6,
       6},
      {"nonsense", {{group, "nonsense\n0::\n"}, {v2, "garbage"}}, 6, 6},
      {"broken mountinfo", {{group, "0::/\n"}, {mounts, "x\n1 2 - cgroup2\n"}}, 6, 6},
      {"v2, mounted elsewhere, under a name with a blank",
       {{group, "0::/a/b\n"},
        {mounts, mounted_v2("/", "/mnt/control\\040groups")},
        {"mnt/control groups/cpu.max", "max 100000"},
        {"mnt/control groups/a/cpu.max", "400000 100000"},
        {"mnt/control groups/a/b/cpu.max", "max 100000"},
        {"sys/fs/cgroup/a/b/cpu.max", "100000 100000"}},
       64,
       4},
      {"v2, nested in a container's group, which is mounted under the host's path",
       {{group, "0::/pod7/box/inner/leaf\n"},
        {mounts, mounted_v2("/pod7/box", "/sys/fs/cgroup")},
        {v2, "800000 100000"},
        {"sys/fs/cgroup/inner/cpu.max", "350000 100000"},
        {"sys/fs/cgroup/inner/leaf/cpu.max", "max 100000"}},
       64,
       3},
      {"v2, the mounted group's name is only the beginning of the process's",
       {{group, "0::/box2\n"},
        {mounts, mounted_v2("/box", "/sys/fs/cgroup")},
        {v2, "600000 100000"},
        {"sys/fs/cgroup/2/cpu.max", "100000 100000"}},
       64,
       6},
      {"v2, the third of five levels has the least",
       {{group, "0::/a/b/c/d/e\n"},
        {mounts, mounted_v2("/", "/sys/fs/cgroup")},
        {"sys/fs/cgroup/a/cpu.max", "900000 100000"},
        {"sys/fs/cgroup/a/b/cpu.max", "800000 100000"},
        {"sys/fs/cgroup/a/b/c/cpu.max", "200000 100000"},
        {"sys/fs/cgroup/a/b/c/d/cpu.max", "700000 100000"},
        {"sys/fs/cgroup/a/b/c/d/e/cpu.max", "500000 100000"}},
       64,
       2},
      {"v2, a path of another namespace",
       {{group, "0::/../x\n"}, {v2, "500000 100000"}, {"sys/fs/cgroup/x/cpu.max", "300000 100000"}},
       64,
       3},
      {"v1 in a container's group; another controller's quota is none",
       {{group, "4:cpuacct,cpu:/docker/1/inner\n3:memory:/docker/1\n"},
        {mounts, kMountedV1},
        {v1 + "cpu.cfs_quota_us", "800000"},
        {v1 + "cpu.cfs_period_us", "100000"},
        {v1 + "inner/cpu.cfs_quota_us", "150000"},
        {v1 + "inner/cpu.cfs_period_us", "50000"},
        {"sys/fs/cgroup/memory/cpu.cfs_quota_us", "100000"},
        {"sys/fs/cgroup/memory/cpu.cfs_period_us", "100000"}},
       64,
       3},
      {"v1 and v2: both count",
       {{group, "4:cpu,cpuacct:/docker/1\n0::/docker/1/x\n"},
        {mounts, kMountedV1 + mounted_v2("/docker/1", "/sys/fs/cgroup/unified")},
        {v1 + "cpu.cfs_quota_us", "800000"},
        {v1 + "cpu.cfs_period_us", "100000"},
        {"sys/fs/cgroup/unified/x/cpu.max", "500000 100000"}},
       64,
       5},
  };
  for (const Files& c : cases) {
    context("%s", c.what);
    const Root root(c.files);
    const size_t threads = default_threads(root.path(), c.affinity);
    EXPECT(threads == c.threads, "%zu threads, expected %zu", threads, c.threads);
  }
  const size_t here = default_threads();
  EXPECT(here >= 1 && here <= cpus_of_this_thread().size(), "%zu threads on %zu CPUs", here,
         cpus_of_this_thread().size());
}

}  // namespace
}  // namespace torch_ext::test
