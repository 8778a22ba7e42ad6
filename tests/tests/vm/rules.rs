//! Rule files go both ways: what the real ipvsadm saves from the kernel's IPVS restores in bpfvs, what bpfvs saves restores there,
//! and both list the same, byte for byte.

use anyhow::{Context, Result, ensure};
use bpfvs_tests::{
    bpfvs::Bpfvs,
    needs_bpfvs, needs_machines,
    netns::Namespace,
    vm::{Machine, Version, machine::ipvs},
};

/// Command lines that make a table with everything that a rule file can say.
const LINES: &str = "\
-A -t 192.0.2.1:80 -s rr
-a -t 192.0.2.1:80 -r 10.0.0.1:80 -g -w 1
-a -t 192.0.2.1:80 -r 10.0.0.2:80 -g -w 2147483647
-a -t 192.0.2.1:80 -r 10.0.0.3:80 -g -w 0
-A -t 192.0.2.1:443 -s wrr -p 600
-a -t 192.0.2.1:443 -r 10.0.0.1:8443 -m -w 5 -x 2000 -y 1000
-a -t 192.0.2.1:443 -r 10.0.0.2:443 -m -x 7
-a -t 192.0.2.1:443 -r 10.1.0.3 -i
-A -t 192.0.2.2:80 -s lc -p
-A -t 192.0.2.2:81 -s wlc -p 60 -M 255.255.255.0
-A -t 192.0.2.2:82 -s lblc
-a -t 192.0.2.2:82 -r 10.0.0.1
-A -t 192.0.2.2:83 -s lblcr
-A -t 192.0.2.2:84 -s dh
-A -t 192.0.2.2:85 -s sh -b sh-fallback,sh-port
-a -t 192.0.2.2:85 -r 10.0.0.1:85 -m
-A -t 192.0.2.2:86 -s mh -b mh-port
-a -t 192.0.2.2:86 -r 10.0.0.9:85 -m
-A -t 192.0.2.2:87 -s sed -b flag-1,flag-3
-A -t 192.0.2.2:88 -s nq
-A -t 192.0.2.2:89 -s fo
-A -t 192.0.2.2:90 -s ovf
-A -t 192.0.2.2:91 -s twos
-A -u 192.0.2.1:53 -s wlc -o
-a -u 192.0.2.1:53 -r 10.0.0.1:53 -i --tun-type gue --tun-port 6080 --tun-nocsum
-a -u 192.0.2.1:53 -r 10.0.0.2:53 -i --tun-type gue --tun-port 6081 --tun-csum
-a -u 192.0.2.1:53 -r 10.0.0.3:53 -i --tun-type gue --tun-port 65535 --tun-remcsum
-a -u 192.0.2.1:53 -r 10.0.0.4:53 -i --tun-type gre
-a -u 192.0.2.1:53 -r 10.0.0.5:53 -i --tun-type gre --tun-csum
-a -u 192.0.2.1:53 -r 2001:db8:1::6 -i
-A --sctp-service 192.0.2.1:5060 -s rr
-a --sctp-service 192.0.2.1:5060 -r 10.0.0.1:5061 -m
-A -t 192.0.2.3:0 -s rr -p 300
-a -t 192.0.2.3:0 -r 10.0.0.1:0 -g
-A -u 200.0.0.1:80 -s rr
-A -u 1.0.0.1:80 -s rr
-A -t [2001:db8::1]:80 -s wlc -p 900 -M 64
-a -t [2001:db8::1]:80 -r [2001:db8:1::1]:80 -g -w 3
-a -t [2001:db8::1]:80 -r [2001:db8:1::2]:8080 -m
-a -t [2001:db8::1]:80 -r 10.0.0.9 -i --tun-type gre --tun-csum
-A -u [::192.0.2.8]:53 -s rr -o
-A -f 10 -s wrr
-a -f 10 -r 10.0.0.1:0 -g -w 2
-a -f 10 -r 10.0.0.2:80 -m
-A -f 10 -6 -s dh -p 50 -M 48
-a -f 10 -6 -r 2001:db8:1::1 -i
-A -f 2147483647 -s rr -o
";

/// What is asked of both: how it is saved, and the listings of what was chosen.
const QUESTIONS: [&str; 5] = ["-Sn", "-Ln", "-Ln --tun-info", "-Ln --thresholds", "-Ln --stats"];

/// Prints the answers, with a line of `====` behind each.
const ANSWER: &str = r"
answer() {
    for question in -Sn -Ln '-Ln --tun-info' '-Ln --thresholds' '-Ln --stats'; do
        ipvsadm $question
        echo ====
    done
}
";

#[test]
fn rule_files_go_both_ways() -> Result<()> {
    needs_machines!([Version::V6_12]);
    needs_bpfvs!();
    let namespace = Namespace::new("rules")?;
    let bpfvs = Bpfvs::start(&namespace, &[])?;
    for line in LINES.lines() {
        bpfvs.ipvsadm(line)?;
    }
    let (ours, complete) = (bpfvs.ipvsadm("-Sn")?, bpfvs.succeed(&["save"])?);

    let script = format!(
        "set -eu\n{ANSWER}\nwhile read -r line; do ipvsadm $line; done </root/lines\nanswer\n\
         for file in ours complete; do ipvsadm-restore </root/$file; answer; done\n"
    );
    let machine = Machine::new(Version::V6_12)?.modules(ipvs(Version::V6_12)).file("/root/lines", LINES);
    let outcome = machine.file("/root/ours", ours).file("/root/complete", complete).run(&script)?;
    ensure!(outcome.status == 0, "ipvsadm in the guest: status {}:\n{}", outcome.status, outcome.output);
    let answers: Vec<_> = outcome.output.split_inclusive("====\n").map(|answer| answer.trim_end_matches("====\n")).collect();
    ensure!(answers.len() == 3 * QUESTIONS.len(), "the guest gave {} answers:\n{}", answers.len(), outcome.output);
    let (typed, restored) = answers.split_at(QUESTIONS.len());
    let (from_ours, from_complete) = restored.split_at(QUESTIONS.len());

    // The same lines make the same table; the kernel's own file makes it, too; but for thresholds, which ipvsadm does not save.
    compare(&bpfvs, typed, "typed")?;
    compare_saved(typed, from_ours, "our ipvsadm -S, restored there")?;
    equal(typed, from_complete, "bpfvs save, restored there")?;
    let theirs = typed.first().context("the first answer is what it saved")?;
    bpfvs.ipvsadm("-C")?;
    bpfvs.restore(theirs)?;
    compare(&bpfvs, from_ours, "theirs, restored here")
}

/// Whether bpfvs answers as the kernel did.
fn compare(bpfvs: &Bpfvs, kernel: &[&str], when: &str) -> Result<()> {
    let ours = QUESTIONS.iter().map(|question| bpfvs.ipvsadm(question)).collect::<Result<Vec<_>>>()?;
    equal(kernel, &ours.iter().map(String::as_str).collect::<Vec<_>>(), when)
}

/// Whether two tables are the same but for thresholds.
fn compare_saved(one: &[&str], other: &[&str], when: &str) -> Result<()> {
    let without_thresholds = |answers: &[&str]| {
        let answers = QUESTIONS.iter().zip(answers).filter(|(question, _)| !question.contains("thresholds"));
        answers.map(|(_, answer)| (*answer).to_owned()).collect::<Vec<_>>()
    };
    ensure!(without_thresholds(one) == without_thresholds(other), "{when}:\n{}\nand\n{}", one.concat(), other.concat());
    Ok(())
}

fn equal(one: &[&str], other: &[&str], when: &str) -> Result<()> {
    for (question, (one, other)) in QUESTIONS.iter().zip(one.iter().zip(other)) {
        ensure!(one == other, "{when}, ipvsadm {question}: the kernel's IPVS says\n{one}\nand the other\n{other}");
    }
    Ok(())
}
