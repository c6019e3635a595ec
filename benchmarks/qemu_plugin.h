// What the plugins for QEMU's user-mode emulator share: the part of its interface that they use, and the markers of regions.
//
// HINT #120, #122, #124, #126 open region 0 to 3, the next odd number closes it; they are no-ops on hardware. Each plugin is
// one file and includes this header once. Option: out=FILE, the file of the results.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

// The interface of version 4 (QEMU 9.2 to 10). Distributions do not package its header.
typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
struct qemu_plugin_scoreboard;
typedef struct {
  struct qemu_plugin_scoreboard* score;
  size_t offset;
} qemu_plugin_u64;
typedef void (*executed_fn)(unsigned int cpu, void* data);
enum { kNoRegisters = 0 };  // enum qemu_plugin_cb_flags
enum { kAdd = 0 };          // enum qemu_plugin_op
enum { kNotEqual = 3 };     // enum qemu_plugin_cond
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb* tb);
struct qemu_plugin_insn* qemu_plugin_tb_get_insn(const struct qemu_plugin_tb* tb, size_t index);
size_t qemu_plugin_insn_data(const struct qemu_plugin_insn* insn, void* to, size_t bytes);
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t id, void (*cb)(qemu_plugin_id_t, struct qemu_plugin_tb*));
void qemu_plugin_register_vcpu_tb_exec_cond_cb(struct qemu_plugin_tb* tb, executed_fn cb, int flags, int condition,
                                               qemu_plugin_u64 entry, uint64_t value, void* data);
void qemu_plugin_register_vcpu_tb_exec_inline_per_vcpu(struct qemu_plugin_tb* tb, int operation, qemu_plugin_u64 entry,
                                                       uint64_t value);
void qemu_plugin_register_vcpu_insn_exec_inline_per_vcpu(struct qemu_plugin_insn* insn, int operation,
                                                         qemu_plugin_u64 entry, uint64_t value);
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn* insn, executed_fn cb, int flags, void* data);
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t id, void (*cb)(qemu_plugin_id_t, void*), void* data);
struct qemu_plugin_scoreboard* qemu_plugin_scoreboard_new(size_t bytes);
uint64_t qemu_plugin_u64_sum(qemu_plugin_u64 entry);
void qemu_plugin_u64_set(qemu_plugin_u64 entry, unsigned int cpu, uint64_t value);

__attribute__((visibility("default"))) int qemu_plugin_version = 4;

enum { kRegions = 4 };

/// Word `index` of a block of instructions.
static inline uint32_t word_of(const struct qemu_plugin_tb* tb, size_t index) {
  uint32_t word = 0;
  qemu_plugin_insn_data(qemu_plugin_tb_get_insn(tb, index), &word, sizeof word);
  return word;
}

/// Whether an instruction is one of HINT #120 to #127.
static inline bool is_marker(uint32_t word) { return (word & 0xFFFFFF1Fu) == 0xD5032F1Fu; }

/// Calls `cb(cpu, marker)` before each execution of a marker: its number from 0 to 7, as a pointer.
static inline void on_each_marker(const struct qemu_plugin_tb* tb, size_t index, executed_fn cb) {
  void* const marker = (void*)(intptr_t)((word_of(tb, index) >> 5) & 7);
  qemu_plugin_register_vcpu_insn_exec_cb(qemu_plugin_tb_get_insn(tb, index), cb, kNoRegisters, marker);
}

static char results_path[4096];

/// Reads the plugin's options.
static inline void read_options(int argc, char** argv) {
  for (int i = 0; i < argc; ++i) {
    if (!strncmp(argv[i], "out=", 4)) snprintf(results_path, sizeof results_path, "%s", argv[i] + 4);
  }
}

/// The file of the results: standard error without out=FILE; NULL if the file cannot be written.
static inline FILE* open_results(void) { return results_path[0] ? fopen(results_path, "w") : stderr; }

static inline void close_results(FILE* file) {
  if (file != stderr) fclose(file);
}
