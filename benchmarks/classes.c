// Plugin of QEMU's user-mode emulator for aarch64: executed instructions by class, of the run and between markers.
//
// Markers are not counted. At exit: "run CLASS=COUNT ...", and "regionN calls=CALLS CLASS=COUNT ..." for each region that was
// opened. Counts are sums over all threads; total is the sum of the classes. Markers and option: qemu_plugin.h.
//
//   cc -O2 -shared -fPIC -o classes.so classes.c
#include <inttypes.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "qemu_plugin.h"

enum Class { kBfmmla, kBfdot, kBfmlal, kI8mm, kI8dot, kFmla, kLoad, kStore, kSimd, kSve, kBranch, kOther, kClasses };
static const char* const names[kClasses] = {"bfmmla", "bfdot", "bfmlal",     "i8mm",      "i8dot",  "fmla",
                                            "load",   "store", "simd_other", "sve_other", "branch", "other"};

struct Counts {
  uint64_t of[kClasses];
};

static qemu_plugin_u64 counters[kClasses];
static struct Counts opened[kRegions], inside[kRegions];
static uint64_t calls[kRegions];

struct Encoding {
  uint32_t mask, bits;
  enum Class class;
};

// Products by their encodings in the Arm Architecture Reference Manual: vector and by element, NEON before SVE.
static const struct Encoding products[] = {
    {0xFFE0FC00, 0x6E40EC00, kBfmmla}, {0xFFE0FC00, 0x6460E400, kBfmmla},                                    //
    {0xBFE0FC00, 0x2E40FC00, kBfdot},  {0xBFC0F400, 0x0F40F000, kBfdot},  {0xFFE0FC00, 0x64608000, kBfdot},  //
    {0xFFE0FC00, 0x64604000, kBfdot},                                                                        //
    {0xBFE0FC00, 0x2EC0FC00, kBfmlal}, {0xBFC0F400, 0x0FC0F000, kBfmlal},                                    //
    {0xDFE0FC00, 0x4E80A400, kI8mm},   {0xFFE0FC00, 0x4E80AC00, kI8mm},   {0xFF20FC00, 0x45009800, kI8mm},   //
    {0x9FE0FC00, 0x0E809400, kI8dot},  {0x9FC0F400, 0x0F80E000, kI8dot},  {0xFFE0F800, 0x44800000, kI8dot},  //
    {0xBFA0FC00, 0x0E20CC00, kFmla},   {0xBF80F400, 0x0F801000, kFmla},   {0xFF20E000, 0x65200000, kFmla},
};

static enum Class class_of(uint32_t word) {
  for (size_t i = 0; i < sizeof products / sizeof *products; ++i) {
    if ((word & products[i].mask) == products[i].bits) return products[i].class;
  }
  const uint32_t group = (word >> 25) & 15;
  if (group == 2) {  // SVE: the upper half are loads and stores
    const uint32_t kind = word >> 29;
    return kind == 7 ? kStore : kind >= 4 ? kLoad : kSve;
  }
  if ((group & 5) == 4) {  // loads and stores
    const uint32_t kind = (word >> 27) & 7;
    const bool vector = (word >> 26) & 1;
    if (kind == 3 && !((word >> 24) & 1)) return kLoad;  // literals
    if (kind == 7 && !vector) return (word >> 22) & 3 ? kLoad : kStore;
    return (word >> 22) & 1 ? kLoad : kStore;
  }
  if ((group & 7) == 7) return kSimd;
  return (group & 14) == 10 ? kBranch : kOther;
}

static void on_marker(unsigned int cpu, void* data) {
  (void)cpu;
  const int marker = (int)(intptr_t)data, region = marker / 2;
  for (int c = 0; c < kClasses; ++c) {
    const uint64_t now = qemu_plugin_u64_sum(counters[c]);
    if (marker % 2) {
      inside[region].of[c] += now - opened[region].of[c];
    } else {
      opened[region].of[c] = now;
    }
  }
  calls[region] += (uint64_t)(marker % 2);
}

static void on_translation(qemu_plugin_id_t id, struct qemu_plugin_tb* tb) {
  (void)id;
  const size_t count = qemu_plugin_tb_n_insns(tb);
  struct Counts sums = {{0}};
  bool marked = false;
  for (size_t i = 0; i < count; ++i) {
    const uint32_t word = word_of(tb, i);
    sums.of[class_of(word)]++;
    marked = marked || is_marker(word);
  }
  if (!marked) {  // One addition for each class of the block.
    for (int c = 0; c < kClasses; ++c) {
      if (sums.of[c]) qemu_plugin_register_vcpu_tb_exec_inline_per_vcpu(tb, kAdd, counters[c], sums.of[c]);
    }
    return;
  }
  for (size_t i = 0; i < count; ++i) {
    const uint32_t word = word_of(tb, i);
    if (is_marker(word)) {
      on_each_marker(tb, i, on_marker);
    } else {
      qemu_plugin_register_vcpu_insn_exec_inline_per_vcpu(qemu_plugin_tb_get_insn(tb, i), kAdd,
                                                          counters[class_of(word)], 1);
    }
  }
}

static void print(FILE* file, const struct Counts* counts) {
  uint64_t total = 0;
  for (int c = 0; c < kClasses; ++c) total += counts->of[c];
  fprintf(file, " total=%" PRIu64, total);
  for (int c = 0; c < kClasses; ++c) fprintf(file, " %s=%" PRIu64, names[c], counts->of[c]);
  fputc('\n', file);
}

static void at_exit(qemu_plugin_id_t id, void* data) {
  (void)id, (void)data;
  FILE* const file = open_results();
  if (!file) return;
  struct Counts run;
  for (int c = 0; c < kClasses; ++c) run.of[c] = qemu_plugin_u64_sum(counters[c]);
  fputs("run", file);
  print(file, &run);
  for (int r = 0; r < kRegions; ++r) {
    if (!calls[r]) continue;
    fprintf(file, "region%d calls=%" PRIu64, r, calls[r]);
    print(file, &inside[r]);
  }
  close_results(file);
}

__attribute__((visibility("default"))) int qemu_plugin_install(qemu_plugin_id_t id, const void* info, int argc,
                                                               char** argv) {
  (void)info;
  read_options(argc, argv);
  struct qemu_plugin_scoreboard* const board = qemu_plugin_scoreboard_new(kClasses * sizeof(uint64_t));
  for (int c = 0; c < kClasses; ++c) counters[c] = (qemu_plugin_u64){board, (size_t)c * sizeof(uint64_t)};
  qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
  qemu_plugin_register_atexit_cb(id, at_exit, NULL);
  return 0;
}
