use obol_kernels::peak::{Peaks, read_speed};
use obol_kernels::{Cpu, Isa};

#[test]
fn every_instruction_set_has_peaks() {
    let buffer = vec![1; 1 << 16];
    for isa in Isa::available() {
        let cpu = Cpu::with_isa(2, isa);
        let Peaks { int8_ops, f32_ops } = Peaks::measure(&cpu);
        for figure in [int8_ops, f32_ops, read_speed(&cpu, &buffer)] {
            assert!(figure.is_finite() && figure > 0.0, "{isa}: {figure}");
        }
    }
}

#[test]
#[should_panic(expected = "a buffer of 100 bytes for 2 threads")]
fn a_buffer_has_a_line_for_each_thread() {
    let _speed = read_speed(&Cpu::with_isa(2, Isa::Portable), &[0; 100]);
}
