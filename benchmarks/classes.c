// Plugin of QEMU's user-mode emulator for aarch64: executed instructions by class, of the run and between markers.
//
// HINT #120, #122, #124, #126 open region 0 to 3, the next odd number closes it; they are no-ops on hardware and are not
// counted. At exit: "run CLASS=COUNT ...", and "regionN calls=CALLS CLASS=COUNT ..." for each region that was opened.
// Counts are sums over all threads; total is the sum of the classes. Option: out=FILE.
//
//   cc -O2 -shared -fPIC -o classes.so classes.c
#include <inttypes.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

// What is used of the emulator's interface for plugins, version 4 (QEMU 9.2 to 10).
typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
struct qemu_plugin_scoreboard;
typedef struct {
  struct qemu_plugin_scoreboard* score;
  size_t offset;
} qemu_plugin_u64;
typedef void (*executed_fn)(unsigned int cpu, void* data);
enum { kNoRegisters = 0, kAdd = 0 };
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb* tb);
struct qemu_plugin_insn* qemu_plugin_tb_get_insn(const struct qemu_plugin_tb* tb, size_t index);
size_t qemu_plugin_insn_data(const struct qemu_plugin_insn* insn, void* to, size_t bytes);
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t id, void (*cb)(qemu_plugin_id_t, struct qemu_plugin_tb*));
void qemu_plugin_register_vcpu_tb_exec_inline_per_vcpu(struct qemu_plugin_tb* tb, int operation, qemu_plugin_u64 entry,
                                                       uint64_t value);
void qemu_plugin_register_vcpu_insn_exec_inline_per_vcpu(struct qemu_plugin_insn* insn, int operation,
                                                         qemu_plugin_u64 entry, uint64_t value);
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn* insn, executed_fn cb, int flags, void* data);
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t id, void (*cb)(qemu_plugin_id_t, void*), void* data);
struct qemu_plugin_scoreboard* qemu_plugin_scoreboard_new(size_t bytes);
uint64_t qemu_plugin_u64_sum(qemu_plugin_u64 entry);

__attribute__((visibility("default"))) int qemu_plugin_version = 4;

enum Class { kBfmmla, kBfdot, kBfmlal, kI8mm, kI8dot, kFmla, kLoad, kStore, kSimd, kSve, kBranch, kOther, kClasses };
static const char* const names[kClasses] = {"bfmmla", "bfdot", "bfmlal",     "i8mm",      "i8dot",  "fmla",
                                            "load",   "store", "simd_other", "sve_other", "branch", "other"};
enum { kRegions = 4 };

struct Counts {
  uint64_t of[kClasses];
};

static qemu_plugin_u64 counters[kClasses];
static struct Counts opened[kRegions], inside[kRegions];
static uint64_t calls[kRegions];
static char path[4096];

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

static bool is_marker(uint32_t word) { return (word & 0xFFFFFF1Fu) == 0xD5032F1Fu; }

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
  uint32_t word = 0;
  for (size_t i = 0; i < count; ++i) {
    qemu_plugin_insn_data(qemu_plugin_tb_get_insn(tb, i), &word, sizeof word);
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
    struct qemu_plugin_insn* const insn = qemu_plugin_tb_get_insn(tb, i);
    qemu_plugin_insn_data(insn, &word, sizeof word);
    if (is_marker(word)) {
      qemu_plugin_register_vcpu_insn_exec_cb(insn, on_marker, kNoRegisters, (void*)(intptr_t)((word >> 5) & 7));
    } else {
      qemu_plugin_register_vcpu_insn_exec_inline_per_vcpu(insn, kAdd, counters[class_of(word)], 1);
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
  FILE* const file = path[0] ? fopen(path, "w") : stderr;
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
  if (file != stderr) fclose(file);
}

__attribute__((visibility("default"))) int qemu_plugin_install(qemu_plugin_id_t id, const void* info, int argc,
                                                               char** argv) {
  (void)info;
  for (int i = 0; i < argc; ++i) {
    if (!strncmp(argv[i], "out=", 4)) snprintf(path, sizeof path, "%s", argv[i] + 4);
  }
  struct qemu_plugin_scoreboard* const board = qemu_plugin_scoreboard_new(kClasses * sizeof(uint64_t));
  for (int c = 0; c < kClasses; ++c) counters[c] = (qemu_plugin_u64){board, (size_t)c * sizeof(uint64_t)};
  qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
  qemu_plugin_register_atexit_cb(id, at_exit, NULL);
  return 0;
}
