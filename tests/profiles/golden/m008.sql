BEGIN TRANSACTION;
CREATE TABLE adaptspec_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT adaptspec_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "adaptspec_version" VALUES('m008');
CREATE TABLE choices (
	id INTEGER NOT NULL, 
	environment_id INTEGER NOT NULL, 
	run VARCHAR(64) NOT NULL, 
	prompt_class VARCHAR NOT NULL, 
	created DATETIME NOT NULL, 
	picks JSON NOT NULL, 
	reason VARCHAR NOT NULL, 
	prompts INTEGER NOT NULL, 
	tried JSON NOT NULL, 
	objective VARCHAR(32) NOT NULL, 
	pinned BOOLEAN NOT NULL, 
	PRIMARY KEY (id), 
	CONSTRAINT uq_choices_class UNIQUE (run, prompt_class), 
	FOREIGN KEY(environment_id) REFERENCES environments (id)
);
INSERT INTO "choices" VALUES(1,1,'r1','chat','2026-01-02 03:04:05.678901','[{"strategy": "prompt_lookup", "params": {"k": 4, "stop": 0.25, "policy": "recent", "on": true}, "reason": "measured 1.50x", "ratio": 1.5, "low": 1.25, "high": 1.65, "needs_draft": false, "needs_heads": false, "lossless": true}]','nothing is reliably faster',4,'["prompt_lookup", "suffix"]','latency',0);
CREATE TABLE environments (
	id INTEGER NOT NULL, 
	digest VARCHAR(64) NOT NULL, 
	model VARCHAR(64) NOT NULL, 
	model_name VARCHAR NOT NULL, 
	draft VARCHAR(64), 
	draft_name VARCHAR, 
	dtype VARCHAR(32) NOT NULL, 
	device VARCHAR(32) NOT NULL, 
	device_name VARCHAR NOT NULL, 
	threads INTEGER NOT NULL, 
	versions JSON NOT NULL, heads VARCHAR(64), heads_name VARCHAR, configuration VARCHAR(64), kernel VARCHAR(64), attention VARCHAR(64), engine VARCHAR(64) DEFAULT 'adaptspec' NOT NULL, concurrency INTEGER DEFAULT '1' NOT NULL, 
	PRIMARY KEY (id), 
	UNIQUE (digest)
);
INSERT INTO "environments" VALUES(1,'4f1a24d81ecb03321577ed2ad37dee0ba6c4047c8e1dcc419e1add044e943d76','m1','target','d1','draft','bfloat16','cpu','A CPU',2,'{"torch": "2.13"}','h1','heads','c1','packed bfloat16','sdpa','adaptspec',1);
CREATE TABLE "profiles" (
	id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	environment_id INTEGER NOT NULL, 
	run VARCHAR(64) NOT NULL, 
	workload VARCHAR(64) NOT NULL, 
	workload_name VARCHAR NOT NULL, 
	prompt_class VARCHAR NOT NULL, 
	strategy VARCHAR NOT NULL, 
	params JSON NOT NULL, 
	lossless BOOLEAN NOT NULL, 
	baseline BOOLEAN NOT NULL, 
	created DATETIME NOT NULL, 
	tokens_per_second FLOAT NOT NULL, 
	ratio FLOAT NOT NULL, 
	measurement JSON NOT NULL, 
	setting VARCHAR(64) NOT NULL, 
	CONSTRAINT uq_profiles_setting UNIQUE (run, prompt_class, strategy, setting, baseline), 
	FOREIGN KEY(environment_id) REFERENCES environments (id)
);
INSERT INTO "profiles" VALUES(1,1,'r1','w1','mine','chat','prompt_lookup','{"k": 4, "stop": 0.25, "policy": "recent", "on": true}',1,0,'2026-01-02 03:04:05.678901',20.0,1.5,'{"tokens_per_second": 20.0, "tokens_per_second_low": 18.0, "tokens_per_second_high": 22.0, "ratio": 1.5, "ratio_low": 1.2, "ratio_high": 1.7, "tokens_per_forward": 2.5, "acceptance": 0.6, "prompts": 4, "tokens": 400, "identical": 3, "near_ties": 1, "seconds_target": 10.0, "seconds_draft": 2.0, "seconds_rest": 0.5, "interval_low": 1.25, "interval_high": 1.65, "latency_p95": 80.0, "peak_memory": 2147483648, "objective": "latency"}','7bf7c9493bdd9556a4ae2a9f761a1b7ac340ce35a5e3625f527fcec7d9a1be4f');
CREATE TABLE tuning_records (
	run VARCHAR(64) NOT NULL, 
	"key" VARCHAR(128) NOT NULL, 
	value JSON NOT NULL, 
	PRIMARY KEY (run, "key")
);
CREATE TABLE tuning_trials (
	id INTEGER NOT NULL, 
	run VARCHAR(64) NOT NULL, 
	prompt_class VARCHAR NOT NULL, 
	strategy VARCHAR NOT NULL, 
	number INTEGER NOT NULL, 
	params JSON NOT NULL, 
	state VARCHAR(16) NOT NULL, 
	value FLOAT, 
	detail JSON NOT NULL, 
	PRIMARY KEY (id), 
	CONSTRAINT uq_tuning_trials_number UNIQUE (run, prompt_class, strategy, number)
);
CREATE TABLE "uses" (
	profile_id INTEGER NOT NULL, 
	prompt_class VARCHAR(256) NOT NULL, 
	requests BIGINT NOT NULL, 
	tokens BIGINT NOT NULL, 
	forwards BIGINT NOT NULL, 
	proposed BIGINT NOT NULL, 
	accepted BIGINT NOT NULL, 
	seconds_prefill FLOAT NOT NULL, 
	seconds FLOAT NOT NULL, 
	log_ratio FLOAT NOT NULL, 
	log_ratio_squared FLOAT NOT NULL, 
	weight FLOAT NOT NULL, 
	PRIMARY KEY (profile_id, prompt_class), 
	FOREIGN KEY(profile_id) REFERENCES profiles (id)
);
INSERT INTO "uses" VALUES(1,'chat',3,300,120,480,180,1.5,15.0,1.2,0.48,3.0);
CREATE INDEX ix_environments_model ON environments (model);
CREATE INDEX ix_profiles_run ON profiles (run);
CREATE INDEX ix_choices_run ON choices (run);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('profiles',1);
COMMIT;
