//! How long it takes to compile a schedule: `cargo bench -p bpfvs`.
//!
//! Servers have different weights and are busy in different degrees, as after some time of traffic. A dynamic scheduler
//! looks as far ahead as there are servers, as it does in the daemon.

use bpfvs::{
    director::model::Family,
    scheduler::{Arrivals, Candidate, Change, Scheduler},
};
use divan::{Bencher, black_box};

fn main() {
    divan::main();
}

fn candidates(count: u32) -> Vec<Candidate> {
    let candidate = |index: u32| {
        let weight = 1 + index.wrapping_mul(0x9e37_79b9) % 7;
        let active = weight * 100 + index.wrapping_mul(0x85eb_ca6b) % 31;
        Candidate {
            index,
            address: (0x0a00_0000 + index).to_be_bytes().into(),
            port: 80,
            weight,
            last_weight: weight,
            overloaded: false,
            upper_threshold: 0,
            active,
            total: active * 2,
        }
    };
    (0..count).map(candidate).collect()
}

#[divan::bench(args = Scheduler::NAMES)]
fn thousand_servers(bencher: Bencher<'_, '_>, name: &str) {
    compile(bencher, name, 1000);
}

#[divan::bench(args = ["wlc", "nq", "twos"])]
fn sixty_five_thousand_servers(bencher: Bencher<'_, '_>, name: &str) {
    compile(bencher, name, 65_535);
}

fn compile(bencher: Bencher<'_, '_>, name: &str, count: u32) {
    let servers = candidates(count);
    let mut scheduler = Scheduler::from_name(name, 0, Family::Ipv4).expect("it is in the list");
    scheduler.servers_changed(&servers, Change::Started);
    let arrivals = Arrivals { count: count.min(8192), ..Arrivals::after(0) };
    bencher.bench_local(|| scheduler.compile(black_box(&servers), arrivals));
}
