"""Moves bytes and knows no models. One medium per file, both ends in it.

    ipc.Exporter ─ Registration (names, views, handles) ─▶ ipc.Importer        same host
    memory.MemoryExporter ─ Registration ─▶ ipc.Importer                       same process
    nccl.Sender ─ broadcast in a group.Group ─▶ nccl.Receiver                  any host

`layout` turns tensors into views of storages and back, and decides when a registration is new;
`shm` shares CPU storages (POSIX shared memory), `cuda` shares GPU storages (CUDA IPC), `memory`
those of this process. `ipc` joins them: what a trainer exports with and a worker imports with.
`group` is where trainer and workers meet, `backends` torch's NCCL and gloo for it.
"""
