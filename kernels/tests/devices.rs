//! Two CUDA devices that add up: in the order of their streams, recorded in graphs, and when one gives up.

use std::thread;

use obol_kernels::cuda::{Buffer, Communicator, DeviceRows, Dtype, Gpu, GroupId};

const RANKS: usize = 2;

/// Runs `work` for each rank in a thread of its own, on its device.
fn on_both<T: Send>(work: impl Fn(usize, &Gpu, Communicator) -> T + Sync) -> Vec<T> {
    let group = GroupId::new().expect("NCCL, or the emulator's libnccl.so.2 in LD_LIBRARY_PATH");
    thread::scope(|scope| {
        let threads: Vec<_> = (0..RANKS)
            .map(|rank| {
                let work = &work;
                scope.spawn(move || {
                    let gpu = Gpu::open(rank).expect("two devices");
                    let communicator = gpu.join(&group, rank, RANKS).expect("a group");
                    work(rank, &gpu, communicator)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    })
}

/// f32, large and small, and the others' different.
fn values(rank: usize, len: usize) -> Vec<f32> {
    (0..len)
        .map(|at| 1.7f32.powi((at * 7 + rank * 5) as i32 % 40 - 20) * (1.0 - 2.0 * (at % 2) as f32))
        .collect()
}

fn upload(gpu: &Gpu, values: &[f32]) -> Buffer {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    gpu.upload(&bytes).expect("memory")
}

fn read(gpu: &Gpu, buffer: &Buffer) -> Vec<f32> {
    let mut bytes = vec![0; buffer.bytes()];
    gpu.read(buffer, 0, &mut bytes).expect("a copy");
    bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

#[test]
fn both_get_the_sums_in_the_order_of_the_stream_and_from_graphs() {
    let (rows, width) = (3, 17);
    let sums: Vec<f32> =
        values(0, rows * width).iter().zip(values(1, rows * width)).map(|(a, b)| a + b).collect();
    let results = on_both(|rank, gpu, communicator| {
        let buffer = upload(gpu, &values(rank, rows * width));
        let x = DeviceRows::new(&buffer, Dtype::F32, width);
        gpu.all_reduce(&communicator, x, rows, width).expect("a sum");
        let once = read(gpu, &buffer);
        let graph = gpu.capture(|| gpu.all_reduce(&communicator, x, rows, width)).expect("a graph");
        assert_eq!(read(gpu, &buffer), once, "recording does nothing");
        for _ in 0..2 {
            graph.launch().expect("a launch");
        }
        (once, read(gpu, &buffer))
    });
    let fourfold: Vec<f32> = sums.iter().map(|sum| sum * 4.0).collect();
    for (once, thrice) in results {
        assert_eq!(once, sums);
        assert_eq!(thrice, fourfold);
    }
}

#[test]
fn a_device_that_gives_up_frees_the_one_that_waits_and_a_new_group_works() {
    let (come, waits) = std::sync::mpsc::channel();
    let waits = std::sync::Mutex::new(waits);
    on_both(|rank, gpu, communicator| {
        let buffer = upload(gpu, &[1.0]);
        let x = DeviceRows::new(&buffer, Dtype::F32, 1);
        if rank == 1 {
            waits.lock().expect("no panic").recv().expect("the other has come");
            communicator.abort();
        } else {
            gpu.all_reduce(&communicator, x, 1, 1).expect("a sum that will not be");
            come.send(()).expect("the other waits");
            // The other's end alone is not enough on every device: both give up, as a group does.
            communicator.abort();
            gpu.synchronize().expect("the device is not lost");
        }
        let error = gpu.all_reduce(&communicator, x, 1, 1).expect_err("nobody adds");
        assert_eq!(error.to_string(), "adding up over devices: another device of the group failed");
    });
    on_both(|_, gpu, communicator| {
        let buffer = upload(gpu, &[2.0]);
        gpu.all_reduce(&communicator, DeviceRows::new(&buffer, Dtype::F32, 1), 1, 1).expect("a sum");
        assert_eq!(read(gpu, &buffer), [4.0]);
    });
}
