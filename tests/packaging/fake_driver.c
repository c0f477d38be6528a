/* A CUDA driver, libcuda.so.1, with a version and without devices: enough for the CUDA runtime to read its version. The
   version is FAKE_DRIVER_VERSION, such as 12080. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

int cuDriverGetVersion(int* version) {
  const char* text = getenv("FAKE_DRIVER_VERSION");
  *version = text == NULL ? 0 : atoi(text);
  return 0;
}

int cuInit(unsigned flags) {
  (void)flags;
  return 0;
}

int cuDeviceGetCount(int* count) {
  *count = 0;
  return 0;
}

static int success(void) { return 0; }

/* Internal tables of functions. The first entry is the table's size in bytes. */
int cuGetExportTable(const void** table, const void* identifier) {
  static void* functions[128];
  (void)identifier;
  functions[0] = (void*)(uintptr_t)sizeof functions;
  for (size_t i = 1; i < sizeof functions / sizeof *functions; ++i) functions[i] = (void*)success;
  *table = functions;
  return 0;
}

int cuGetProcAddress_v2(const char* name, void** function, int version, uint64_t flags, int* status);

/* Every function that is not here succeeds and does nothing. */
int cuGetProcAddress(const char* name, void** function, int version, uint64_t flags) {
  static const struct {
    const char* name;
    void* function;
  } known[] = {
      {"cuDriverGetVersion", (void*)cuDriverGetVersion}, {"cuInit", (void*)cuInit},
      {"cuDeviceGetCount", (void*)cuDeviceGetCount},     {"cuGetExportTable", (void*)cuGetExportTable},
      {"cuGetProcAddress", (void*)cuGetProcAddress_v2},
  };
  (void)version;
  (void)flags;
  *function = (void*)success;
  for (size_t i = 0; i < sizeof known / sizeof *known; ++i) {
    if (strcmp(known[i].name, name) == 0) *function = known[i].function;
  }
  return 0;
}

int cuGetProcAddress_v2(const char* name, void** function, int version, uint64_t flags, int* status) {
  if (status != NULL) *status = 0;
  return cuGetProcAddress(name, function, version, flags);
}
