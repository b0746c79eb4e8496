/* A fake libnvidia-ml.so.1: the calls that vram_manager and nvidia-ml-py make, answered from a mapped file.
 *
 * FAKE_NVML_STATE names the file; it is opened anew at every init, and every call looks at it again, so a
 * test steers the library while another thread is inside it. Compiled with -DNO_V2 it lacks the symbols that
 * drivers before 510 lack (memory v2, process lists v3) and the newer TemperatureV.
 *
 * The file's layout is the one of vram_manager/simulator/nvml_state.py; keep both in step. The few structs of
 * NVML itself are written from their documented layout: sizes are part of the version numbers below.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

enum { MAX_GPUS = 8, MAX_PARTS = 8, MAX_DEVICES = MAX_GPUS + MAX_PARTS, MAX_PLACES = 7, MAX_PROCESSES = 16 };
enum kind { COMPUTE = 1, GRAPHICS = 2, MPS = 4 };
enum code {
    SUCCESS = 0,
    UNINITIALIZED = 1,
    INVALID_ARGUMENT = 2,
    NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7,
    LIBRARY_NOT_FOUND = 12,
    VERSION_MISMATCH = 25,
};

struct fake_process {
    uint32_t pid, kinds;
    uint64_t used;
};

struct fake_gpu {
    uint64_t total, reserved, used, free;
    int32_t handle_error, error;
    int32_t uuid_error, name_error, memory_error, utilization_error, temperature_error, power_error;
    int32_t compute_error, graphics_error, mps_error;
    int32_t mig_mode_error, mig_error;
    uint32_t mig_mode, places[MAX_PLACES];
    uint32_t utilization, temperature, power;
    uint32_t process_count, grows;
    struct fake_process processes[MAX_PROCESSES];
    char name[96], uuid[80];
};

struct state {
    uint32_t gpu_count;
    int32_t init_error, count_error;
    uint32_t hang_ms, hanging;
    uint32_t inits, shutdowns, name_calls, process_calls;
    int32_t newest_error;
    uint32_t newest_calls, calls;
    char driver_version[80];
    struct fake_gpu gpus[MAX_DEVICES];
};

/* NVML's own structs. */
struct memory_v1 { uint64_t total, free, used; };                                      /* used includes reserved */
struct memory_v2 { uint32_t version; uint64_t total, reserved, free, used; };          /* 40 bytes: 0x02000028 */
struct process_info { uint32_t pid; uint64_t used; uint32_t gpu_instance, compute_instance; };  /* 24 bytes */
struct utilization { uint32_t gpu, memory; };
struct temperature_v1 { uint32_t version, sensor; int32_t celsius; };                  /* 12 bytes: 0x0100000C */

static volatile struct state *state;
static int references;

/* A handle is the address of one of these; it says nothing, as NVML's own. */
static char handles[MAX_DEVICES];

static int gpu_index(const void *handle)
{
    const char *place = handle;
    return place >= handles && place < handles + MAX_DEVICES ? (int)(place - handles) : -1;
}

static uint64_t milliseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

/* Every call passes here first: it is counted, and it hangs for as long as the state says so. */
static void enter(void)
{
    if (!state)
        return;
    __atomic_add_fetch(&state->calls, 1, __ATOMIC_SEQ_CST);
    if (!state->hang_ms)
        return;
    uint64_t since = milliseconds();
    __atomic_add_fetch(&state->hanging, 1, __ATOMIC_SEQ_CST);
    while (milliseconds() - since < state->hang_ms) {
        struct timespec pause = {0, 1000000};
        nanosleep(&pause, NULL);
    }
    __atomic_sub_fetch(&state->hanging, 1, __ATOMIC_SEQ_CST);
}

/* Enters a call about one device; 0 and the device, or why not. */
static int device(const void *handle, volatile struct fake_gpu **gpu)
{
    enter();
    if (!references)
        return UNINITIALIZED;
    int index = gpu_index(handle);
    if (index < 0)
        return INVALID_ARGUMENT;
    *gpu = &state->gpus[index];
    return (*gpu)->error;
}

static int text(const volatile char *from, char *to, unsigned length)
{
    snprintf(to, length, "%s", (const char *)from);
    return SUCCESS;
}

EXPORT unsigned fake_nvml_sizeof(void)
{
    return sizeof(struct state);
}

/* The older mapping stays: a call that still hangs in it must see its hang end. */
EXPORT int nvmlInitWithFlags(unsigned flags)
{
    (void)flags;
    const char *path = getenv("FAKE_NVML_STATE");
    int file = path ? open(path, O_RDWR) : -1;
    if (file < 0)
        return LIBRARY_NOT_FOUND;
    void *map = mmap(NULL, sizeof(struct state), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (map == MAP_FAILED)
        return LIBRARY_NOT_FOUND;
    state = map;
    __atomic_add_fetch(&state->inits, 1, __ATOMIC_SEQ_CST);
    enter();
    if (state->init_error)
        return state->init_error;
    references++;
    return SUCCESS;
}

EXPORT int nvmlShutdown(void)
{
    enter();
    if (!references)
        return UNINITIALIZED;
    references--;
    __atomic_add_fetch(&state->shutdowns, 1, __ATOMIC_SEQ_CST);
    return SUCCESS;
}

EXPORT const char *nvmlErrorString(int code)
{
    (void)code;
    enter();
    return "the fake was asked for words";
}

EXPORT int nvmlSystemGetDriverVersion(char *version, unsigned length)
{
    enter();
    return references ? text(state->driver_version, version, length) : UNINITIALIZED;
}

EXPORT int nvmlDeviceGetCount_v2(unsigned *count)
{
    enter();
    if (!references)
        return UNINITIALIZED;
    *count = state->gpu_count;
    return state->count_error;
}

EXPORT int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle)
{
    enter();
    if (!references)
        return UNINITIALIZED;
    if (index >= state->gpu_count || index >= MAX_GPUS)
        return INVALID_ARGUMENT;
    *handle = &handles[index];
    return state->gpus[index].handle_error;
}

EXPORT int nvmlDeviceGetUUID(void *handle, char *uuid, unsigned length)
{
    volatile struct fake_gpu *gpu;
    int error = device(handle, &gpu);
    if (error || (error = gpu->uuid_error))
        return error;
    return text(gpu->uuid, uuid, length);
}

EXPORT int nvmlDeviceGetName(void *handle, char *name, unsigned length)
{
    volatile struct fake_gpu *gpu;
    int error = device(handle, &gpu);
    if (error || (error = gpu->name_error))
        return error;
    __atomic_add_fetch(&state->name_calls, 1, __ATOMIC_SEQ_CST);
    return text(gpu->name, name, length);
}

EXPORT int nvmlDeviceGetMemoryInfo(void *handle, struct memory_v1 *memory)
{
    volatile struct fake_gpu *gpu;
    int error = device(handle, &gpu);
    if (error || (error = gpu->memory_error))
        return error;
    *memory = (struct memory_v1){gpu->total, gpu->free, gpu->reserved + gpu->used};
    return SUCCESS;
}

EXPORT int nvmlDeviceGetUtilizationRates(void *handle, struct utilization *rates)
{
    volatile struct fake_gpu *gpu;
    int error = device(handle, &gpu);
    if (error || (error = gpu->utilization_error))
        return error;
    *rates = (struct utilization){gpu->utilization, 0};
    return SUCCESS;
}

EXPORT int nvmlDeviceGetTemperature(void *handle, unsigned sensor, unsigned *celsius)
{
    volatile struct fake_gpu *gpu;
    int error = device(handle, &gpu);
    (void)sensor;
    if (error || (error = gpu->temperature_error))
        return error;
    *celsius = gpu->temperature;
    return SUCCESS;
}

EXPORT int nvmlDeviceGetPowerUsage(void *handle, unsigned *milliwatts)
{
    volatile struct fake_gpu *gpu;
    int error = device(handle, &gpu);
    if (error || (error = gpu->power_error))
        return error;
    *milliwatts = gpu->power;
    return SUCCESS;
}

EXPORT int nvmlDeviceGetMigMode(void *handle, unsigned *current, unsigned *pending)
{
    volatile struct fake_gpu *gpu;
    int error = device(handle, &gpu);
    if (error || (error = gpu->mig_mode_error))
        return error;
    *current = *pending = gpu->mig_mode;
    return SUCCESS;
}

EXPORT int nvmlDeviceGetMaxMigDeviceCount(void *handle, unsigned *count)
{
    volatile struct fake_gpu *gpu;
    int error = device(handle, &gpu);
    *count = MAX_PLACES;
    return error;
}

EXPORT int nvmlDeviceGetMigDeviceHandleByIndex(void *handle, unsigned place, void **instance)
{
    volatile struct fake_gpu *gpu;
    int error = device(handle, &gpu);
    if (error || (error = gpu->mig_error))
        return error;
    if (place >= MAX_PLACES || !gpu->places[place])
        return NOT_FOUND;
    *instance = &handles[gpu->places[place]];
    return SUCCESS;
}

/* Without a buffer: the length, as INSUFFICIENT_SIZE unless it is 0. With one: filled, or too small by now. */
static int processes(void *handle, enum kind kind, unsigned *count, struct process_info *infos)
{
    volatile struct fake_gpu *gpu;
    int error = device(handle, &gpu);
    if (error)
        return error;
    error = kind == COMPUTE ? gpu->compute_error : kind == GRAPHICS ? gpu->graphics_error : gpu->mps_error;
    if (error)
        return error;
    __atomic_add_fetch(&state->process_calls, 1, __ATOMIC_SEQ_CST);
    if (infos && gpu->grows) {
        gpu->grows--;
        return INSUFFICIENT_SIZE;
    }
    unsigned found = 0;
    for (unsigned i = 0; i < gpu->process_count && i < MAX_PROCESSES; i++) {
        volatile struct fake_process *process = &gpu->processes[i];
        if (!(process->kinds & kind))
            continue;
        if (infos && found < *count)
            infos[found] = (struct process_info){process->pid, process->used, UINT32_MAX, UINT32_MAX};
        found++;
    }
    int fits = found == 0 || (infos && found <= *count);
    *count = found;
    return fits ? SUCCESS : INSUFFICIENT_SIZE;
}

#define PROCESS_LIST(symbol, before, kind)                                        \
    EXPORT int symbol(void *handle, unsigned *count, struct process_info *infos)  \
    {                                                                             \
        int error = before;                                                       \
        return error ? error : processes(handle, kind, count, infos);             \
    }

PROCESS_LIST(nvmlDeviceGetComputeRunningProcesses_v2, SUCCESS, COMPUTE)
PROCESS_LIST(nvmlDeviceGetGraphicsRunningProcesses_v2, SUCCESS, GRAPHICS)
PROCESS_LIST(nvmlDeviceGetMPSComputeRunningProcesses_v2, SUCCESS, MPS)

#ifndef NO_V2

/* A library can be newer than its driver: then the symbol is there and answers FUNCTION_NOT_FOUND. */
static int newest(void)
{
    if (!references)
        return UNINITIALIZED;
    __atomic_add_fetch(&state->newest_calls, 1, __ATOMIC_SEQ_CST);
    return state->newest_error;
}

PROCESS_LIST(nvmlDeviceGetComputeRunningProcesses_v3, newest(), COMPUTE)
PROCESS_LIST(nvmlDeviceGetGraphicsRunningProcesses_v3, newest(), GRAPHICS)
PROCESS_LIST(nvmlDeviceGetMPSComputeRunningProcesses_v3, newest(), MPS)

EXPORT int nvmlDeviceGetMemoryInfo_v2(void *handle, struct memory_v2 *memory)
{
    volatile struct fake_gpu *gpu;
    int error = device(handle, &gpu);
    if (error || (error = newest()) || (error = gpu->memory_error))
        return error;
    if (memory->version != 0x02000028)
        return VERSION_MISMATCH;
    *memory = (struct memory_v2){memory->version, gpu->total, gpu->reserved, gpu->free, gpu->used};
    return SUCCESS;
}

EXPORT int nvmlDeviceGetTemperatureV(void *handle, struct temperature_v1 *temperature)
{
    volatile struct fake_gpu *gpu;
    int error = device(handle, &gpu);
    if (error || (error = newest()) || (error = gpu->temperature_error))
        return error;
    if (temperature->version != 0x0100000C)
        return VERSION_MISMATCH;
    temperature->celsius = (int32_t)gpu->temperature;
    return SUCCESS;
}

#endif
