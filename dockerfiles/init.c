// PID 1 of the images: init PROGRAM ARGUMENT...
//
// Runs the program, passes signals on to it, collects processes that are left without a parent, and ends as it ends. PID 1
// has no default actions: a signal without a handler is lost, and Python needs 20 ms natively, seconds under emulation, until
// it has one. Here signals are blocked by the first instructions of main, so that the kernel keeps them. A program that dies
// of a SIGTERM or SIGINT that was passed on had no handler yet, and nothing to lose: the exit code is 0. Of another signal it
// is 128 + its number, as of a shell.
//
// The program is not PID 1: under emulation, an illegal instruction in PID 1 hangs for ever.
//
//   cc -O2 -static -o init init.c
#include <errno.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

// Faults of this process, and stops by a terminal, keep their actions.
static const int kept[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT, SIGSYS, SIGTTIN, SIGTTOU};

int main(int count, char** arguments) {
  sigset_t all, before;
  sigfillset(&all);
  for (size_t i = 0; i < sizeof kept / sizeof *kept; ++i) sigdelset(&all, kept[i]);
  sigprocmask(SIG_BLOCK, &all, &before);
  if (count < 2) {
    fputs("init: expected a program to run\n", stderr);
    return 2;
  }
  prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);  // It may itself be the child of an engine's init.
  const pid_t program = fork();
  if (program < 0) {
    fprintf(stderr, "init: cannot fork: %s\n", strerror(errno));
    return 1;
  }
  if (program == 0) {
    sigprocmask(SIG_SETMASK, &before, NULL);
    execvp(arguments[1], arguments + 1);
    fprintf(stderr, "init: cannot run %s: %s\n", arguments[1], strerror(errno));
    _exit(127);
  }
  bool stopped = false;
  for (;;) {
    siginfo_t info;
    const int number = sigwaitinfo(&all, &info);
    if (number < 0) continue;  // EINTR
    if (number != SIGCHLD) {
      stopped = stopped || number == SIGTERM || number == SIGINT;
      kill(program, number);
      continue;
    }
    int status;
    for (pid_t ended; (ended = waitpid(-1, &status, WNOHANG)) > 0;) {
      if (ended != program) continue;
      if (WIFEXITED(status)) return WEXITSTATUS(status);
      const int cause = WTERMSIG(status);
      return stopped && (cause == SIGTERM || cause == SIGINT) ? 0 : 128 + cause;
    }
  }
}
