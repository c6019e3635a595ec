// Plugin of QEMU's user-mode emulator for aarch64: how often every block of instructions ran between markers.
//
// HINT #120, #122, #124, #126 open region 0 to 3, the next odd number closes it. At exit, one line for each block that ran
// in a region: region, executions, instructions as hexadecimal words. Option: out=FILE. One thread at a time is assumed.
//
//   cc -O2 -shared -fPIC -o blocks.so blocks.c
#include <inttypes.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// What is used of the emulator's interface for plugins, version 4 (QEMU 10).
typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
struct qemu_plugin_scoreboard;
typedef struct {
  struct qemu_plugin_scoreboard* score;
  size_t offset;
} qemu_plugin_u64;
typedef void (*executed_fn)(unsigned int cpu, void* data);
enum { kNoRegisters = 0, kNotEqual = 3 };
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb* tb);
struct qemu_plugin_insn* qemu_plugin_tb_get_insn(const struct qemu_plugin_tb* tb, size_t index);
size_t qemu_plugin_insn_data(const struct qemu_plugin_insn* insn, void* to, size_t bytes);
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t id, void (*cb)(qemu_plugin_id_t, struct qemu_plugin_tb*));
void qemu_plugin_register_vcpu_tb_exec_cond_cb(struct qemu_plugin_tb* tb, executed_fn cb, int flags, int condition,
                                               qemu_plugin_u64 entry, uint64_t value, void* data);
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn* insn, executed_fn cb, int flags, void* data);
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t id, void (*cb)(qemu_plugin_id_t, void*), void* data);
struct qemu_plugin_scoreboard* qemu_plugin_scoreboard_new(size_t bytes);
void qemu_plugin_u64_set(qemu_plugin_u64 entry, unsigned int cpu, uint64_t value);

__attribute__((visibility("default"))) int qemu_plugin_version = 4;

enum { kRegions = 4 };

struct Block {
  struct Block* next;
  uint64_t executions[kRegions];
  size_t count;
  uint32_t words[];
};

static struct Block* blocks;
static qemu_plugin_u64 inside;  // 1 + the open region, 0 outside
static int region;
static char path[4096];

static void on_block(unsigned int cpu, void* data) {
  (void)cpu;
  ((struct Block*)data)->executions[region]++;
}

static void on_marker(unsigned int cpu, void* data) {
  const int marker = (int)(intptr_t)data;
  region = marker / 2;
  qemu_plugin_u64_set(inside, cpu, marker % 2 ? 0 : 1 + (uint64_t)region);
}

static void on_translation(qemu_plugin_id_t id, struct qemu_plugin_tb* tb) {
  (void)id;
  const size_t count = qemu_plugin_tb_n_insns(tb);
  struct Block* const block = calloc(1, sizeof *block + count * sizeof block->words[0]);
  if (!block) abort();
  block->count = count;
  block->next = blocks;
  blocks = block;
  for (size_t i = 0; i < count; ++i) {
    struct qemu_plugin_insn* const insn = qemu_plugin_tb_get_insn(tb, i);
    qemu_plugin_insn_data(insn, &block->words[i], sizeof block->words[i]);
    if ((block->words[i] & 0xFFFFFF1Fu) == 0xD5032F1Fu) {  // HINT #120 to #127
      qemu_plugin_register_vcpu_insn_exec_cb(insn, on_marker, kNoRegisters,
                                             (void*)(intptr_t)((block->words[i] >> 5) & 7));
    }
  }
  qemu_plugin_register_vcpu_tb_exec_cond_cb(tb, on_block, kNoRegisters, kNotEqual, inside, 0, block);
}

static void at_exit(qemu_plugin_id_t id, void* data) {
  (void)id, (void)data;
  FILE* const file = path[0] ? fopen(path, "w") : stderr;
  if (!file) return;
  for (const struct Block* block = blocks; block; block = block->next) {
    for (int r = 0; r < kRegions; ++r) {
      if (!block->executions[r]) continue;
      fprintf(file, "%d %" PRIu64, r, block->executions[r]);
      for (size_t i = 0; i < block->count; ++i) fprintf(file, " %08" PRIx32, block->words[i]);
      fputc('\n', file);
    }
  }
  if (file != stderr) fclose(file);
}

__attribute__((visibility("default"))) int qemu_plugin_install(qemu_plugin_id_t id, const void* info, int argc,
                                                               char** argv) {
  (void)info;
  for (int i = 0; i < argc; ++i) {
    if (!strncmp(argv[i], "out=", 4)) snprintf(path, sizeof path, "%s", argv[i] + 4);
  }
  inside.score = qemu_plugin_scoreboard_new(sizeof(uint64_t));
  inside.offset = 0;
  qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
  qemu_plugin_register_atexit_cb(id, at_exit, NULL);
  return 0;
}
