//! Compiles `cuda/*.cu`, each to a fat binary: machine code for the architectures named below and PTX for newer
//! ones. Without the feature `cuda` it does nothing.
//!
//! Finds nvcc by `CUDA_HOME`, `PATH`, or where `scripts/cuda-toolkit` puts it. What ptxas says of registers and
//! spills is kept for a test. A file is compiled again only when it, a header, or the way to compile changed.

use std::env::{self, VarError};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::thread;

/// Machine code is made for these; the oldest one's PTX serves newer devices.
const ARCHITECTURES: [&str; 4] = ["80", "86", "89", "90"];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    for name in ["CUDA_HOME", "PATH", "OBOL_CUDA_TOOLKIT", "OBOL_CUDA_ARCHITECTURES"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    println!("cargo::rerun-if-changed=cuda");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let mut sources = Vec::new();
    let mut headers = String::new();
    for entry in fs::read_dir("cuda").expect("kernels/cuda is there") {
        let path = entry.expect("kernels/cuda can be read").path();
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("cu") => sources.push(path),
            Some("cuh") => headers += &read(&path),
            _ => {}
        }
    }
    sources.sort();
    let chosen = env::var("OBOL_CUDA_ARCHITECTURES");
    let architectures: Vec<&str> = match &chosen {
        Ok(chosen) => chosen.split(',').collect(),
        Err(VarError::NotPresent) => ARCHITECTURES.to_vec(),
        Err(error) => panic!("OBOL_CUDA_ARCHITECTURES: {error}"),
    };
    let compiler = Compiler { nvcc: find_nvcc(), architectures, out, headers };
    let todo = Mutex::new(sources.iter());
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let failed = Mutex::new(String::new());
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let Some(source) = todo.lock().expect("no panic inside").next() else { break };
                    if let Err(problem) = compiler.compile(source) {
                        *failed.lock().expect("no panic inside") += &problem;
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().expect("no panic inside");
    assert!(failed.is_empty(), "{failed}");
    compiler.write_modules(&sources);
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn stem(source: &Path) -> &str {
    source.file_stem().and_then(|stem| stem.to_str()).expect("kernel sources have plain names")
}

/// The first nvcc there is.
fn find_nvcc() -> PathBuf {
    let home = env::var_os("HOME").map(PathBuf::from).unwrap_or_default();
    let toolkits = [
        env::var_os("CUDA_HOME").map(PathBuf::from),
        env::var_os("OBOL_CUDA_TOOLKIT").map(PathBuf::from),
        Some(
            env::var_os("XDG_CACHE_HOME").map_or(home.join(".cache"), PathBuf::from).join("obol/cuda-13.0.2"),
        ),
    ];
    let inside = |root: PathBuf| [root.join("bin/nvcc"), root.join("nvidia/cu13/bin/nvcc")];
    let paths = env::var_os("PATH").unwrap_or_default();
    let candidates = toolkits.into_iter().flatten().flat_map(inside);
    let candidates = candidates.chain(env::split_paths(&paths).map(|folder| folder.join("nvcc")));
    candidates.into_iter().find(|path| path.is_file()).unwrap_or_else(|| {
        panic!("no nvcc for the feature `cuda`: run scripts/cuda-toolkit, or set CUDA_HOME to a CUDA 13.0 toolkit")
    })
}

struct Compiler<'a> {
    nvcc: PathBuf,
    architectures: Vec<&'a str>,
    out: PathBuf,
    /// All headers, since each source may read any.
    headers: String,
}

impl Compiler<'_> {
    fn compile(&self, source: &Path) -> Result<(), String> {
        let (name, text) = (stem(source), read(source));
        let mut arguments = vec![
            "-fatbin".to_owned(),
            "-std=c++17".into(),
            "-O3".into(),
            // The emulator reads the PTX; and a few hundred kB are not worth unpacking at each start.
            "--no-compress".into(),
            "-Xptxas=-v".into(),
        ];
        let oldest = self.architectures[0];
        arguments.push(format!("-gencode=arch=compute_{oldest},code=compute_{oldest}"));
        arguments.extend(self.architectures.iter().map(|a| format!("-gencode=arch=compute_{a},code=sm_{a}")));
        let compiler = self.nvcc.display().to_string();
        let key = [compiler.as_str(), &arguments.join(" "), &self.headers, &text].join("\n");
        let file = |extension: &str| self.out.join(format!("{name}.{extension}"));
        if fs::read_to_string(file("key")).is_ok_and(|known| known == key) {
            return Ok(());
        }
        let mut nvcc = Command::new(&self.nvcc);
        let output = nvcc.args(&arguments).arg("-o").arg(file("fatbin")).arg(source).output();
        let output = output.map_err(|error| format!("{}: {error}\n", self.nvcc.display()))?;
        let said = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() {
            return Err(format!("{} does not compile:\n{said}\n", source.display()));
        }
        let write = |extension: &str, text: &str| {
            fs::write(file(extension), text)
                .map_err(|error| format!("{}: {error}\n", file(extension).display()))
        };
        write("ptxas", &said)?;
        write("key", &key)
    }

    /// The modules as a table, and all that ptxas said.
    fn write_modules(&self, sources: &[PathBuf]) {
        let mut table = String::from("&[\n");
        let mut said = String::new();
        for source in sources {
            let name = stem(source);
            let file = |extension: &str| self.out.join(format!("{name}.{extension}"));
            writeln!(table, "    ({name:?}, &Aligned(*include_bytes!({:?})).0),", file("fatbin"))
                .expect("a string takes all");
            said += &read(&file("ptxas"));
        }
        table += "]\n";
        fs::write(self.out.join("modules.rs"), table).expect("the table can be written");
        fs::write(self.out.join("ptxas.txt"), said).expect("what ptxas said can be written");
    }
}
