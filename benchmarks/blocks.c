// Plugin of QEMU's user-mode emulator for aarch64: how often every block of instructions ran between markers.
//
// At exit, one line for each block that ran in a region: region, executions, instructions as hexadecimal words. One thread
// at a time is assumed. Markers and option: qemu_plugin.h.
//
//   cc -O2 -shared -fPIC -o blocks.so blocks.c
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "qemu_plugin.h"

struct Block {
  struct Block* next;
  uint64_t executions[kRegions];
  size_t count;
  uint32_t words[];
};

static struct Block* blocks;
static qemu_plugin_u64 inside;  // 1 + the open region, 0 outside
static int region;

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
    block->words[i] = word_of(tb, i);
    if (is_marker(block->words[i])) on_each_marker(tb, i, on_marker);
  }
  qemu_plugin_register_vcpu_tb_exec_cond_cb(tb, on_block, kNoRegisters, kNotEqual, inside, 0, block);
}

static void at_exit(qemu_plugin_id_t id, void* data) {
  (void)id, (void)data;
  FILE* const file = open_results();
  if (!file) return;
  for (const struct Block* block = blocks; block; block = block->next) {
    for (int r = 0; r < kRegions; ++r) {
      if (!block->executions[r]) continue;
      fprintf(file, "%d %" PRIu64, r, block->executions[r]);
      for (size_t i = 0; i < block->count; ++i) fprintf(file, " %08" PRIx32, block->words[i]);
      fputc('\n', file);
    }
  }
  close_results(file);
}

__attribute__((visibility("default"))) int qemu_plugin_install(qemu_plugin_id_t id, const void* info, int argc,
                                                               char** argv) {
  (void)info;
  read_options(argc, argv);
  inside.score = qemu_plugin_scoreboard_new(sizeof(uint64_t));
  inside.offset = 0;
  qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
  qemu_plugin_register_atexit_cb(id, at_exit, NULL);
  return 0;
}
