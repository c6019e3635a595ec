// Longer than other files, since threads agree by a few atomic variables, and all that touches them is here.
#include "runtime/thread_pool.h"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <utility>

#if defined(__linux__)
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace torch_ext {
namespace {

// ---- waiting --------------------------------------------------------------------------------------------------------

// How long a thread that waits stays awake. Until a sleeping thread runs takes 12 to 33 us on a virtual machine (AMD
// EPYC 7001, Linux 6.18, two threads that meet in a job after 200 us and 5 ms of idleness), and putting it to sleep
// some more. Staying awake for about that long costs at most twice what the better of the two would have, and the
// parts of a layer follow one another faster.
constexpr std::chrono::microseconds kSpin{50};

// After so long of it, whoever shares the core has its turn: it may be the thread that is waited for.
constexpr std::chrono::microseconds kSpinBeforeYield{5};

// Leaves the core to the other threads on it for some ten nanoseconds, and the cache line that is waited for to its
// writer.
void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  // Neoverse cores execute YIELD as a NOP; ISB, which empties the pipeline, takes about as long as a PAUSE of x86.
  __asm__ volatile("isb" ::: "memory");
#endif
}

// Waits for kSpin at most; returns whether it has come.
template <typename HasCome>
bool spin_until(const HasCome& has_come) {
  const auto start = std::chrono::steady_clock::now();
  for (auto turn = start;;) {
    for (size_t i = 0; i < 16; ++i) {
      if (has_come()) return true;
      relax();
    }
    const auto now = std::chrono::steady_clock::now();
    if (now - start >= kSpin) return false;
    if (now - turn < kSpinBeforeYield) continue;
    std::this_thread::yield();
    turn = now;
  }
}

// Sleeps if the word is `expected`, until `wake` is called on it, or for no reason: the caller looks at the word again.
void sleep_while(std::atomic<uint32_t>& word, uint32_t expected) {
#if defined(__linux__)
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
#else
  word.wait(expected);
#endif
}

// Wakes up to `count` threads that sleep on the word.
void wake(std::atomic<uint32_t>& word, uint32_t count) {
#if defined(__linux__)
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0);
#else
  word.notify_all();
#endif
}

static_assert(sizeof(std::atomic<uint32_t>) == 4, "the kernel waits on the word itself");

// ---- fork -----------------------------------------------------------------------------------------------------------

// Number of forks between the first process and this one.
std::atomic<uint32_t> g_generation{0};

#if defined(__linux__)
// Registered when the library is loaded: a lock around "once" could be held by another thread at the moment of a fork.
[[maybe_unused]] const int g_fork_handler =
    pthread_atfork(nullptr, nullptr, [] { g_generation.fetch_add(1, std::memory_order_relaxed); });
#endif

// ---- what threads inherit -------------------------------------------------------------------------------------------

#if defined(__linux__)

// The CPUs that this thread may run on, ascending; empty if the system does not tell.
std::vector<int> allowed_cpus() {
  // The kernel refuses sets that are too small for the CPUs that the machine could have.
  for (size_t words = 1; words <= 1024; words *= 2) {
    std::vector<cpu_set_t> set(words);
    const size_t bytes = words * sizeof(cpu_set_t);
    if (sched_getaffinity(0, bytes, set.data()) != 0) continue;
    std::vector<int> cpus;
    for (size_t cpu = 0; cpu < 8 * bytes; ++cpu) {
      if (CPU_ISSET_S(cpu, bytes, set.data())) cpus.push_back(static_cast<int>(cpu));
    }
    return cpus;
  }
  return {};
}

std::string join(const std::vector<int>& cpus) {
  std::string text;
  for (const int cpu : cpus) text += (text.empty() ? "" : ",") + std::to_string(cpu);
  return text;
}

// Whether this thread runs on these CPUs, and no others, from now on.
bool move_to(std::vector<int> cpus) {
  std::sort(cpus.begin(), cpus.end());
  cpus.erase(std::unique(cpus.begin(), cpus.end()), cpus.end());
  if (cpus.empty() || cpus.front() < 0 || cpus.back() >= 1 << 20) return false;
  std::vector<cpu_set_t> set(static_cast<size_t>(cpus.back()) / CPU_SETSIZE + 1);
  const size_t bytes = set.size() * sizeof(cpu_set_t);
  for (const int cpu : cpus) CPU_SET_S(static_cast<size_t>(cpu), bytes, set.data());
  // Linux leaves out the CPUs that the control group forbids, and says so only if none is left.
  return sched_setaffinity(0, bytes, set.data()) == 0 && allowed_cpus() == cpus;
}

// A new thread takes its signal mask and its CPUs from its creator. The creator has those of a worker for as long as
// this lives, so that no worker ever handles a signal or runs elsewhere.
class WorkerAttributes {
 public:
  WorkerAttributes() : cpus_(allowed_cpus()) {
    sigset_t blocked;
    sigfillset(&blocked);
    // Faults of the thread's own reach whoever reports crashes.
    for (const int fault : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP, SIGSYS}) sigdelset(&blocked, fault);
    // On Linux this thread's mask, as pthread_sigmask, which has another version in every other glibc.
    sigprocmask(SIG_SETMASK, &blocked, &signals_);
  }
  WorkerAttributes(const WorkerAttributes&) = delete;
  ~WorkerAttributes() {
    if (moved_) move_to(cpus_);
    sigprocmask(SIG_SETMASK, &signals_, nullptr);
  }

  void use_cpus(const std::vector<int>& cpus) {
    moved_ = true;
    if (move_to(cpus)) return;
    throw std::runtime_error("thread pool: expected CPUs that this process may run on, got " + join(cpus) +
                             "; this thread may run on " + join(cpus_) +
                             ": leave cpus empty, or see the cpuset of the container");
  }

 private:
  const std::vector<int> cpus_;
  sigset_t signals_;
  bool moved_ = false;
};

void name_thread(size_t worker) { prctl(PR_SET_NAME, ("torch_ext-" + std::to_string(worker)).c_str(), 0, 0, 0); }

#else

std::vector<int> allowed_cpus() { return std::vector<int>(std::thread::hardware_concurrency()); }

class WorkerAttributes {
 public:
  void use_cpus(const std::vector<int>&) {
    throw std::runtime_error("thread pool: threads can be kept on chosen CPUs on Linux only: leave cpus empty");
  }
};

void name_thread(size_t) {}

#endif

// Whether this thread is in a task, of any pool.
thread_local bool t_in_task = false;

// Tasks do not throw: std::terminate is called if one does.
void run_alone(size_t tasks, ThreadPool::Task task, void* context) noexcept {
  const bool outer = std::exchange(t_in_task, true);
  for (size_t i = 0; i < tasks; ++i) task(context, i);
  t_in_task = outer;
}

}  // namespace

// ---- the pool -------------------------------------------------------------------------------------------------------

/// The threads of one process, and the job that they share. After a fork it is left as it is, and never looked at
/// again.
///
/// A job is its fields and the number of its tasks that nobody has taken. Whoever takes a task counts that number
/// down by one, never below 0, and reads the fields afterwards: a job whose task has been taken cannot end before
/// that task has run, and while a job has not ended its fields stay. So a worker that comes late, even in the middle
/// of taking a task, gets one of the job of that moment with that job's function, or none.
struct ThreadPool::Team {
  explicit Team(const Options& options);
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;
  ~Team() { stop_workers(); }

  void run(uint32_t count, Task new_task, void* new_context);
  void send(void (*errand)());

  const uint32_t generation = g_generation.load(std::memory_order_relaxed);

 private:
  static constexpr size_t kCacheLine = 64;
  static constexpr uint32_t kCallerSleeps = uint32_t{1} << 31;  // a bit of `unfinished_`

  void start_workers(const Options& options);
  void stop_workers();
  void work(size_t worker);
  void take_tasks() noexcept;
  void wake_workers(uint32_t tasks);
  void wait_until_finished();

  bool spins_ = false;  // with more threads than CPUs, who waits for another takes the CPU from it
  std::vector<std::thread> workers_;
  std::mutex turn_;  // of the calls

  // The job. Written by its caller while untaken_ is 0.
  Task task_ = nullptr;
  void* context_ = nullptr;
  uint32_t tasks_ = 0;

  alignas(kCacheLine) std::atomic<uint32_t> untaken_{0};
  // Number of the job, which workers wait for. Written after untaken_.
  std::atomic<uint32_t> job_{0};
  // The caller waits for 0.
  alignas(kCacheLine) std::atomic<uint32_t> unfinished_{0};
  alignas(kCacheLine) std::atomic<uint32_t> sleepers_{0};
  std::atomic<bool> stop_{false};

  // Written before job_, as stop_ is. The number of errands so far, and the last one.
  std::atomic<uint32_t> errands_{0};
  std::atomic<void (*)()> errand_{nullptr};
};

ThreadPool::Team::Team(const Options& options) {
  try {
    start_workers(options);
  } catch (...) {
    stop_workers();
    throw;
  }
}

void ThreadPool::Team::start_workers(const Options& options) {
  WorkerAttributes attributes;
  if (!options.cpus.empty()) attributes.use_cpus(options.cpus);
  const std::vector<int> allowed = allowed_cpus(), &cpus = options.cpus.empty() ? allowed : options.cpus;
  spins_ = options.threads <= default_threads("", allowed.size());
  workers_.reserve(options.threads - 1);
  for (size_t worker = 1; worker < options.threads; ++worker) {
    if (options.pin && !cpus.empty()) attributes.use_cpus({cpus[worker % cpus.size()]});
    try {
      workers_.emplace_back([this, worker] { work(worker); });
    } catch (const std::system_error& error) {
      throw std::system_error(error.code(),
                              "thread pool: the system refuses thread " + std::to_string(worker + 1) + " of " +
                                  std::to_string(options.threads) +
                                  ": ask for fewer, or raise the limit of processes (ulimit -u, pids.max)");
    }
  }
}

void ThreadPool::Team::stop_workers() {
  stop_.store(true, std::memory_order_relaxed);
  job_.fetch_add(1);  // publishes stop_
  wake(job_, static_cast<uint32_t>(workers_.size()));
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::Team::work(size_t worker) {
  name_thread(worker);
  t_in_task = true;
  uint32_t errands = 0;
  for (;;) {
    // Read before untaken_: if a job comes after the look at untaken_, this is not its number.
    const uint32_t job = job_.load(std::memory_order_acquire);
    take_tasks();
    if (stop_.load(std::memory_order_relaxed)) return;
    if (const uint32_t sent = errands_.load(std::memory_order_acquire); sent != errands) {
      errands = sent;
      errand_.load(std::memory_order_relaxed)();
    }
    if (spins_ && spin_until([&] { return job_.load(std::memory_order_relaxed) != job; })) continue;
    // First sleepers_, then job_, which the kernel looks at; wake_workers writes job_ and then reads sleepers_. So
    // one of the two sees what the other wrote, and nobody sleeps through a job.
    sleepers_.fetch_add(1);
    sleep_while(job_, job);
    sleepers_.fetch_sub(1, std::memory_order_relaxed);
  }
}

void ThreadPool::Team::take_tasks() noexcept {
  uint32_t taken = 0;
  uint32_t untaken = untaken_.load(std::memory_order_relaxed);
  while (untaken > 0) {
    if (!untaken_.compare_exchange_weak(untaken, untaken - 1, std::memory_order_acquire)) continue;
    task_(context_, tasks_ - untaken);
    ++taken;
    untaken = untaken_.load(std::memory_order_relaxed);
  }
  // All of one job, which cannot end before this.
  if (taken == 0) return;
  if (unfinished_.fetch_sub(taken, std::memory_order_acq_rel) == (taken | kCallerSleeps)) wake(unfinished_, 1);
}

void ThreadPool::Team::run(uint32_t count, Task new_task, void* new_context) {
  const std::lock_guard<std::mutex> lock(turn_);
  task_ = new_task;
  context_ = new_context;
  tasks_ = count;
  unfinished_.store(count, std::memory_order_relaxed);
  untaken_.store(count, std::memory_order_release);
  job_.fetch_add(1);
  wake_workers(count - 1);
  t_in_task = true;
  take_tasks();
  t_in_task = false;
  wait_until_finished();
}

void ThreadPool::Team::send(void (*errand)()) {
  const std::lock_guard<std::mutex> lock(turn_);
  errand_.store(errand, std::memory_order_relaxed);
  errands_.fetch_add(1, std::memory_order_release);
  job_.fetch_add(1);
  wake(job_, static_cast<uint32_t>(workers_.size()));
}

// Wakes as many as it takes for `tasks` tasks, besides those that are awake.
void ThreadPool::Team::wake_workers(uint32_t tasks) {
  const uint32_t sleeping = sleepers_.load();
  if (sleeping == 0) return;
  const uint32_t awake = static_cast<uint32_t>(workers_.size()) - sleeping;
  if (tasks > awake) wake(job_, std::min(tasks - awake, sleeping));
}

void ThreadPool::Team::wait_until_finished() {
  if (unfinished_.load(std::memory_order_acquire) == 0) return;
  if (spins_ && spin_until([&] { return unfinished_.load(std::memory_order_acquire) == 0; })) return;
  uint32_t left = unfinished_.fetch_or(kCallerSleeps, std::memory_order_acquire) | kCallerSleeps;
  while (left != kCallerSleeps) {
    sleep_while(unfinished_, left);
    left = unfinished_.load(std::memory_order_acquire);
  }
}

ThreadPool::ThreadPool(const Options& options) : options_(options), team_(nullptr) {
  if (options.threads == 0) {
    throw std::runtime_error("thread pool: expected at least 1 thread, got 0: default_threads() fits this process");
  }
  team_ = new Team(options);
}

ThreadPool::~ThreadPool() {
  Team* const team = team_.load(std::memory_order_acquire);
  // The threads of a parent cannot be joined, and what they had locked stays locked.
  if (team->generation == g_generation.load(std::memory_order_relaxed)) delete team;
}

// The threads of this process.
ThreadPool::Team* ThreadPool::team() {
  Team* team = team_.load(std::memory_order_acquire);
  if (team->generation == g_generation.load(std::memory_order_relaxed)) return team;
  // The first call in a forked child. If there are several, one of them puts its threads in. No lock: it could have
  // been held by another thread at the moment of the fork.
  auto fresh = std::make_unique<Team>(options_);
  return team_.compare_exchange_strong(team, fresh.get(), std::memory_order_acq_rel) ? fresh.release() : team;
}

void ThreadPool::parallel(size_t tasks, Task task, void* context) {
  if (tasks <= 1 || options_.threads == 1 || t_in_task) return run_alone(tasks, task, context);
  constexpr size_t kMost = 0x7fffffff;
  if (tasks > kMost) {
    throw std::runtime_error("thread pool: expected at most " + std::to_string(kMost) + " tasks, got " +
                             std::to_string(tasks) + ": make larger ones");
  }
  team()->run(static_cast<uint32_t>(tasks), task, context);
}

void ThreadPool::on_each_thread(void (*errand)()) {
  Team* const team = team_.load(std::memory_order_acquire);
  if (!t_in_task && team->generation == g_generation.load(std::memory_order_relaxed)) team->send(errand);
  errand();
}

// ---- CPUs of this process -------------------------------------------------------------------------------------------

namespace {

using Words = std::vector<std::string>;

// The parts of a text between separators, empty ones included, `most` of them at most.
Words split(const std::string& text, char separator, size_t most = SIZE_MAX) {
  Words parts{""};
  for (const char c : text) {
    if (c == separator && parts.size() < most) {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
}

// The same without empty parts: words, or folders of a path.
Words words(const std::string& text, char separator) {
  Words parts = split(text, separator);
  parts.erase(std::remove(parts.begin(), parts.end(), ""), parts.end());
  return parts;
}

bool holds(const Words& all, const std::string& one) { return std::find(all.begin(), all.end(), one) != all.end(); }

// A file's content; empty if it cannot be read.
std::string read_file(const std::string& path) {
  std::string content;
  if (std::FILE* const file = std::fopen(path.c_str(), "re")) {
    char part[4096];
    while (const size_t n = std::fread(part, 1, sizeof part, file)) content.append(part, n);
    std::fclose(file);
  }
  return content;
}

// The words of a file's lines.
Words read_words(const std::string& path) {
  std::string content = read_file(path);
  std::replace(content.begin(), content.end(), '\n', ' ');
  return words(content, ' ');
}

// A field of mountinfo: blanks and backslashes in it are octal.
std::string unescape(const std::string& field) {
  std::string text;
  for (size_t i = 0; i < field.size(); ++i) {
    const std::string digits = field[i] == '\\' ? field.substr(i + 1, 3) : "";
    if (digits.size() == 3 && digits.find_first_not_of("01234567") == std::string::npos) {
      text += static_cast<char>(std::stoi(digits, nullptr, 8));
      i += 3;
    } else {
      text += field[i];
    }
  }
  return text;
}

// A place where control groups, version 1 or 2, are mounted.
struct CgroupMount {
  int version;
  Words controllers;  // of version 1
  Words root;         // path of the group that is mounted, as /proc/self/cgroup spells paths
  std::string point;
};

std::vector<CgroupMount> cgroup_mounts(const std::string& mountinfo) {
  std::vector<CgroupMount> mounts;
  for (const std::string& line : split(mountinfo, '\n')) {
    const size_t middle = line.find(" - ");
    if (middle == std::string::npos) continue;
    const Words fields = split(line.substr(0, middle), ' '), kind = split(line.substr(middle + 3), ' ');
    if (fields.size() < 6 || kind.size() < 3 || (kind[0] != "cgroup" && kind[0] != "cgroup2")) continue;
    mounts.push_back({.version = kind[0] == "cgroup2" ? 2 : 1,
                      .controllers = split(kind[2], ','),
                      .root = words(unescape(fields[3]), '/'),
                      .point = unescape(fields[4])});
  }
  return mounts;
}

// How many CPUs' time a group may use; infinity without a limit.
double quota_of_group(int version, const std::string& folder) {
  Words fields = read_words(folder + (version == 2 ? "/cpu.max" : "/cpu.cfs_quota_us"));
  if (version == 1) {
    const Words period = read_words(folder + "/cpu.cfs_period_us");
    fields.insert(fields.end(), period.begin(), period.end());
  }
  double value[2] = {};
  if (fields.size() == 2) {
    for (size_t i = 0; i < 2; ++i) {
      // "max" and -1 are no limit.
      if (fields[i].find_first_not_of("0123456789") == std::string::npos)
        value[i] = std::strtod(fields[i].c_str(), nullptr);
    }
  }
  return value[0] > 0 && value[1] > 0 ? value[0] / value[1] : HUGE_VAL;
}

// The least quota of the groups that the process is in and of all above them.
double cpu_quota(const std::string& root) {
  const std::vector<CgroupMount> mounts = cgroup_mounts(read_file(root + "/proc/self/mountinfo"));
  double least = HUGE_VAL;
  for (const std::string& line : split(read_file(root + "/proc/self/cgroup"), '\n')) {
    const Words fields = split(line, ':', 3);  // number, controllers, path
    if (fields.size() < 3) continue;
    const int version = fields[0] == "0" && fields[1].empty() ? 2 : 1;
    if (version == 1 && !holds(split(fields[1], ','), "cpu")) continue;
    std::vector<CgroupMount> places;
    for (const CgroupMount& mount : mounts) {
      if (mount.version == version && (version == 2 || holds(mount.controllers, "cpu"))) places.push_back(mount);
    }
    if (places.empty()) {  // where they usually are
      const std::string usual = "/sys/fs/cgroup";
      for (const std::string& point :
           version == 2 ? Words{usual, usual + "/unified"} : Words{usual + "/" + fields[1], usual + "/cpu"}) {
        places.push_back({.version = version, .controllers = {}, .root = {}, .point = point});
      }
    }
    for (const CgroupMount& place : places) {
      Words group = words(fields[2], '/');
      // A container sees the groups from its own on, under the host's path or under "/". A path that does not begin
      // with that of the mount is of another namespace: whatever of it is mounted here counts.
      if (group.size() >= place.root.size() && std::equal(place.root.begin(), place.root.end(), group.begin())) {
        group.erase(group.begin(), group.begin() + static_cast<std::ptrdiff_t>(place.root.size()));
      }
      group.erase(std::remove(group.begin(), group.end(), ".."), group.end());
      std::string folder = root + place.point;
      least = std::min(least, quota_of_group(version, folder));
      for (const std::string& below : group) {
        folder += "/" + below;
        least = std::min(least, quota_of_group(version, folder));
      }
    }
  }
  return least;
}

}  // namespace

size_t default_threads(const std::string& root, size_t affinity) {
  const double usable = std::min(std::floor(cpu_quota(root)), static_cast<double>(affinity));
  return std::max<size_t>(1, static_cast<size_t>(usable));
}

size_t default_threads() { return default_threads("", allowed_cpus().size()); }

}  // namespace torch_ext
