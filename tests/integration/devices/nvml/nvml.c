/* A stand-in for the driver's libnvidia-ml.so.1: as much of NVML as the fleet asks, over GPUs that tests describe.
 *
 * The file that NVML_STATE names is read anew at every call, so that a GPU can break while a process runs. One line a
 * GPU: uuid, memory used and total in MB, utilisation in %, uncorrected ECC errors (-1: not supported), lost (0 or 1),
 * Xid (a change of it is an event), MIG slice (0 or 1: not counted, found by its uuid). Without a file there is no driver.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { SUCCESS = 0, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, NO_DRIVER = 9, TIMEOUT = 10, LOST = 15 };
enum { MOST = 16, XID_CRITICAL = 8 };
typedef unsigned long long u64;
typedef struct { char uuid[96]; u64 used, total; int load, ecc, lost, xid, slice; } gpu_t;
typedef struct { void *device; u64 type, data; unsigned gpu_instance, compute_instance; } event_t;
typedef struct { int registered[MOST], seen[MOST]; } set_t;

static int read_state(gpu_t *gpus) {
  const char *name = getenv("NVML_STATE");
  FILE *file = name ? fopen(name, "r") : NULL;
  int count = 0;
  if (!file) return -1;
  while (count < MOST) {
    gpu_t *g = &gpus[count];
    if (fscanf(file, "%95s %llu %llu %d %d %d %d %d", g->uuid, &g->used, &g->total, &g->load, &g->ecc, &g->lost, &g->xid,
               &g->slice) != 8) break;
    count++;
  }
  fclose(file);
  return count;
}

static int find(void *device, gpu_t *out) {
  gpu_t gpus[MOST];
  int count = read_state(gpus);
  size_t at = (size_t)device;
  if (count < 0) return NO_DRIVER;
  if (at < 1 || at > (size_t)count) return INVALID;
  *out = gpus[at - 1];
  return out->lost ? LOST : SUCCESS;
}

int nvmlInitWithFlags(unsigned flags) { gpu_t gpus[MOST]; (void)flags; return read_state(gpus) < 0 ? NO_DRIVER : SUCCESS; }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int code) {
  return code == LOST ? "GPU is lost" : code == NO_DRIVER ? "Driver Not Loaded" : code == NOT_FOUND ? "Not Found" : "Error";
}

int nvmlDeviceGetCount_v2(unsigned *count) {
  gpu_t gpus[MOST];
  int all = read_state(gpus);
  if (all < 0) return NO_DRIVER;
  *count = 0;
  for (int i = 0; i < all; i++) *count += !gpus[i].slice;
  return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
  gpu_t gpu;
  *device = (void *)(size_t)(index + 1); /* slices come last in the file */
  return find(*device, &gpu);
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
  gpu_t gpus[MOST];
  int count = read_state(gpus);
  for (int i = 0; i < count; i++)
    if (!strcmp(gpus[i].uuid, uuid)) { *device = (void *)(size_t)(i + 1); return gpus[i].lost ? LOST : SUCCESS; }
  return NOT_FOUND;
}

int nvmlDeviceGetUUID(void *device, char *text, unsigned size) {
  gpu_t gpu;
  int code = find(device, &gpu);
  if (!code) snprintf(text, size, "%s", gpu.uuid);
  return code;
}

int nvmlDeviceGetName(void *device, char *text, unsigned size) {
  gpu_t gpu;
  int code = find(device, &gpu);
  if (!code) snprintf(text, size, "Stand-in %llu MB", gpu.total);
  return code;
}

int nvmlDeviceGetMemoryInfo(void *device, u64 *memory) {
  gpu_t gpu;
  int code = find(device, &gpu);
  if (!code) { memory[0] = gpu.total << 20; memory[2] = gpu.used << 20; memory[1] = memory[0] - memory[2]; }
  return code;
}

int nvmlDeviceGetUtilizationRates(void *device, unsigned *rates) {
  gpu_t gpu;
  int code = find(device, &gpu);
  if (!code && gpu.slice) return NOT_SUPPORTED;
  if (!code) { rates[0] = (unsigned)gpu.load; rates[1] = 0; }
  return code;
}

int nvmlDeviceGetTemperature(void *device, int sensor, unsigned *degrees) {
  gpu_t gpu;
  int code = find(device, &gpu);
  (void)sensor;
  if (!code) *degrees = 40;
  return code;
}

int nvmlDeviceGetTotalEccErrors(void *device, int type, int counter, u64 *errors) {
  gpu_t gpu;
  int code = find(device, &gpu);
  if (code) return code;
  if (gpu.ecc < 0) return NOT_SUPPORTED;
  *errors = type == 1 && counter == 0 ? (u64)gpu.ecc : 0;
  return SUCCESS;
}

int nvmlEventSetCreate(set_t **set) { *set = calloc(1, sizeof(set_t)); return *set ? SUCCESS : INVALID; }
int nvmlEventSetFree(set_t *set) { free(set); return SUCCESS; }

int nvmlDeviceRegisterEvents(void *device, u64 types, set_t *set) {
  gpu_t gpu;
  int code = find(device, &gpu);
  size_t at = (size_t)device - 1;
  if (code) return code;
  if (!(types & XID_CRITICAL) || gpu.slice) return NOT_SUPPORTED;
  set->registered[at] = 1;
  set->seen[at] = gpu.xid;
  return SUCCESS;
}

int nvmlEventSetWait_v2(set_t *set, event_t *event, unsigned timeout_ms) {
  struct timespec pause = {0, 1000000};
  for (unsigned waited = 0;; waited++) {
    gpu_t gpus[MOST];
    int count = read_state(gpus);
    for (int i = 0; i < count; i++)
      if (set->registered[i] && gpus[i].xid && gpus[i].xid != set->seen[i]) {
        set->seen[i] = gpus[i].xid;
        *event = (event_t){(void *)(size_t)(i + 1), XID_CRITICAL, (u64)gpus[i].xid, ~0u, ~0u};
        return SUCCESS;
      }
    if (waited >= timeout_ms) return TIMEOUT;
    nanosleep(&pause, NULL);
  }
}
