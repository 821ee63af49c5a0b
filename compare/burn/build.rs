//! Tells the program the version of burn that the lock file names.

fn main() {
    println!("cargo::rerun-if-changed=../Cargo.lock");
    let lock = std::fs::read_to_string("../Cargo.lock").unwrap_or_default();
    let mut lines = lock.lines().skip_while(|line| *line != "name = \"burn\"");
    let version = lines.nth(1).and_then(|line| line.split('"').nth(1)).unwrap_or("of unknown version");
    println!("cargo::rustc-env=BURN_VERSION={version}");
}
